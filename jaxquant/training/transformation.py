"""What this package asks of an optimizer of optax, which it does not import."""

from typing import Any, Protocol, TypeVar


class Transformation(Protocol):
    """What `optax.GradientTransformation` is: a named tuple of two functions."""

    @property
    def init(self) -> Any: ...

    @property
    def update(self) -> Any: ...

    def _replace(self, **kwargs: Any) -> Any: ...


AnyTransformation = TypeVar("AnyTransformation", bound=Transformation)


def check_transformation(x: Any) -> None:
    """Raises unless x can be wrapped.

    Raises:
        ValueError: x has no init and update, or is no named tuple of them.
    """
    if not all(hasattr(x, name) for name in ("init", "update", "_replace")):
        raise ValueError(
            "transformation must be an optax.GradientTransformation, such as optax.adamw(1e-3); "
            f"got {x!r}. Of optax.MultiSteps, pass .gradient_transformation()."
        )
