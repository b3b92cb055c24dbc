"""What a method of quantization is.

A method sees one matrix (N, K) = (outputs, inputs) at a time, whatever the parameter looks like:
the driver brings stacked layers, attention kernels and transposed kernels into this form and back.
Elements that share a scale are adjacent columns: group j holds columns j * g to (j + 1) * g.

Several methods form a chain, in order: transforms, which change the matrix and its activations so
that y = W x stays the same, and at the end one that chooses the codes.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from ..core import ArrayConfig, Axes, BlockRotation, QTensor
from .statistics import Statistic

Statistics = dict[type[Statistic], Any]
Notes = dict[str, jax.Array]


@runtime_checkable
class Method(Protocol):
    """Chooses the codes of a matrix. A frozen dataclass, hashable; called under jit and vmap.

    Attributes:
        statistics: the statistics of activations that it needs, none for data-free methods.
    """

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """The statistics of activations that it reads."""
        ...

    def __call__(
        self, weight: jax.Array, means: Statistics, config: ArrayConfig, axis: Axes
    ) -> QTensor | tuple[QTensor, Notes]:
        """Quantizes a matrix.

        Args:
            weight: (N, K) float32.
            means: `finish()` of each statistic in `statistics`, by class, for the K columns.
            config: groups along axis 1.
            axis: 1; or (0, 1) where outputs share scales too, as with per-tensor scales.

        Returns:
            QTensor (N, K) like that of `jaxquant.quantize(weight, config, axis)`, except for the
            choice of scales and codes; alone, or with notes: scalars by name, such as the damping
            that was used.
        """
        ...


def is_method(x: Any) -> bool:
    """Whether x is a method, not its class."""
    return isinstance(x, Method) and not isinstance(x, type)


def with_notes(result: QTensor | tuple[QTensor, Notes]) -> tuple[QTensor, Notes]:
    """What a method returned, with no notes if it has none."""
    return result if isinstance(result, tuple) else (result, {})


def check_count(name: str, value: Any, least: int) -> None:
    """Raises unless a field of a method is an int of at least 0 or 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = "positive" if least else "nonnegative"
        raise ValueError(f"{name} must be a {wanted} int; got {value!r}.")


class Transformed(NamedTuple):
    """A matrix whose activations are changed, so that the product stays the same.

    Attributes:
        weight: (N, K).
        multiplier: (K,), for the activations: weight * multiplier is the given matrix. None to
            multiply them with nothing.
        rotation: R, for the activations after that: weight R^T is the given matrix, before it is
            multiplied. None for no rotation.
    """

    weight: jax.Array
    multiplier: jax.Array | None = None
    rotation: BlockRotation | None = None


@runtime_checkable
class Transform(Protocol):
    """Changes a matrix and its activations before the codes are chosen. As for `Method`."""

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """The statistics of activations that it reads."""
        ...

    def transform(
        self, weight: jax.Array, means: Statistics, config: ArrayConfig, axis: Axes
    ) -> Transformed:
        """The matrix with columns divided by the multiplier of their activations, or rotated."""
        ...


def is_transform(x: Any) -> bool:
    """Whether x is a transform, not its class."""
    return isinstance(x, Transform) and not isinstance(x, type)
