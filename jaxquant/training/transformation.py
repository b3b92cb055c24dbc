"""The interface of optax transformations, because this package does not import optax."""

from typing import Any, Protocol, TypeVar


class Transformation(Protocol):
    """Interface of `optax.GradientTransformation`: a named tuple of two functions."""

    @property
    def init(self) -> Any: ...

    @property
    def update(self) -> Any: ...

    def _replace(self, **kwargs: Any) -> Any: ...


AnyTransformation = TypeVar("AnyTransformation", bound=Transformation)


def check_transformation(x: Any) -> None:
    """Raises unless x is an optax transformation.

    Raises:
        ValueError: x is not a named tuple with init and update.
    """
    if not all(hasattr(x, name) for name in ("init", "update", "_replace")):
        raise ValueError(
            "transformation must be an optax.GradientTransformation, such as optax.adamw(1e-3); "
            f"got {x!r}. For optax.MultiSteps, pass its .gradient_transformation()."
        )
