"""What `dispatch` asks of the arguments of an operation."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax

from .operands import AxesOfBoth
from .record import Convolution
from .shares import Shares


class Spec(Protocol):
    """The arguments of an operation other than its operands, in terms of stored axes."""

    operation: ClassVar[str]  # Name of the function of `jax.lax`.

    @property
    def contract(self) -> AxesOfBoth:
        """Stored axes that are contracted, of both operands."""
        ...

    @property
    def channels(self) -> AxesOfBoth:
        """Those of them that a multiplier of `inputs` is for."""
        ...

    @property
    def batch(self) -> AxesOfBoth:
        """Stored axes along which matrices are multiplied in pairs, of both operands."""
        ...

    @property
    def group_sizes(self) -> Any:
        """Rows that meet each matrix of a ragged product; None for other operations."""
        ...

    @property
    def arrays(self) -> tuple[Any, ...]:
        """Array arguments of the operation other than its operands. A None is not given."""
        ...

    @property
    def with_arrays(self) -> Callable[..., "Spec"]:
        """Method: the spec with other such arrays."""
        ...

    def with_unquantized(self, rows: jax.Array | None) -> "Spec":
        """The spec with lhs before its rows were quantized, for kernels that do this themselves."""
        ...

    def unfold(self, x: jax.Array, weights: Any) -> jax.Array | None:
        """The operand x with all elements that one result of `weights` sums along `channels`."""
        ...

    def length(self, lhs: Any, rhs: Any) -> int:
        """Products that are added for one element of the result."""
        ...

    def rows(self, lhs: Any, rhs: Any) -> int | None:
        """Rows of activations, if one matrix on the right multiplies them all; else None."""
        ...

    def convolution(self, lhs: Any, rhs: Any) -> Convolution | None:
        """What a convolution is; None for others."""
        ...

    def shares(self, lhs: Any, rhs: Any) -> Shares | None:
        """How devices share arrays that are sharded along explicit axes; None if they do not."""
        ...
