"""Flags: arguments that must be True or False."""


def check_flags(**flags: object) -> None:
    """Checks that arguments are True or False, because other values also count as one of these.

    Raises:
        ValueError: one is something else, such as "no", which would count as True.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(
                f"{name} must be True or False; got {value!r}. Write {name}=True or {name}=False."
            )
