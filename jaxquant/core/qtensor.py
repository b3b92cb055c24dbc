"""The quantized array."""

import abc
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import affine
from .blocks import blocks_between, split, to_blocks
from .config import ArrayConfig
from .formats import Format, bits_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """How an operand is treated before it meets a quantized array in a product.

        x  ->  x * multiplier  ->  quantized with `config`, and `scale` if there is one

    Attributes:
        config: how to quantize the operand, with scales shared along the contracted axes;
            None leaves it as it is. Static.
        scale: calibrated scale of the whole operand, a scalar; None computes it anew each time.
        zero_point: that of a calibrated asymmetric operand, a scalar.
        multiplier: one factor per contracted channel (SmoothQuant's 1/s, AWQ's 1/s), in the
            shape of the contracted axes of this array, in its order; for a convolution, one per
            input channel. None for 1.
        tap: called with the operand before it is quantized, by whoever observes operands; None
            for nobody.
    """

    config: ArrayConfig | None = dataclasses.field(default=None, metadata={"static": True})
    scale: jax.Array | None = None
    zero_point: jax.Array | None = None
    multiplier: jax.Array | None = None
    tap: Any = None


class Shaped(abc.ABC):
    """What stands for an array and is a pytree of others. It has what follows from its shape."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it stands for."""

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in device memory of all its arrays, from their bits."""
        return sum(packed_bytes(x) for x in jax.tree.leaves(self))

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Raises TypeError, where NumPy would make an array of one object."""
        raise TypeError(f"A {type(self).__name__} is not an array; got {self!r}. {_INSTEAD}")

    def __jax_array__(self) -> jax.Array:
        """Raises TypeError, for functions of jax.numpy that are given it."""
        raise TypeError(f"A {type(self).__name__} is not an array; got {self!r}. {_INSTEAD}")


_INSTEAD = (
    "Multiply by jq.matmul or jq.einsum, look up rows by jq.take, or get the floats by "
    "q.dequantize()."
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QTensor(Shaped):
    """A quantized array: x ~ (codes - zero_point) * scale. A pytree.

    What always holds between the fields (not checked, because JAX rebuilds pytrees with
    tracers and placeholders in them):

    - `codes` has the dtype of `format`, and its trailing axes lie in the order `order`;
    - `scale` and `zero_point` have the rank of `codes` and its axis order, and each of their
      lengths divides that of `codes`: one element for each block of codes;
    - `scale` may itself be a QTensor;
    - a scale of NaN marks a block that held NaN or Inf;
    - `values`, if there, has the shape of `codes` and equals what they decode to.

    Attributes:
        codes: the stored codes.
        scale: step, in units of x per code.
        zero_point: the code of zero, in units of codes; None is zero.
        inputs: how an operand that meets this array in a product is treated first.
        values: in training, the floats that the codes stand for, to which gradients go (see
            `Deferred`); None otherwise.
        format: number format of the codes, static.
        dtype: dtype that the array dequantizes to, static.
        order: order in which the trailing axes are stored, counted from the end: (-1, -2)
            stores the last two axes swapped. None: as they come. Static. Everything else in
            the library speaks of logical axes, those of the array that was quantized.
    """

    codes: jax.Array
    scale: "jax.Array | QTensor"
    zero_point: jax.Array | None = None
    inputs: Inputs | None = None
    values: jax.Array | None = None
    format: Format = dataclasses.field(kw_only=True, metadata={"static": True})
    dtype: Any = dataclasses.field(kw_only=True, metadata={"static": True})
    order: tuple[int, ...] | None = dataclasses.field(
        default=None, kw_only=True, metadata={"static": True}
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that was quantized."""
        return tuple(self.codes.shape[a] for a in self.stored_axes(range(self.ndim)))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.codes.ndim

    def stored_axes(self, axes: Iterable[int]) -> tuple[int, ...]:
        """Where logical axes lie in `codes`, from 0 up."""
        order = self.order or ()
        moved = {a: i - len(order) for i, a in enumerate(order)}
        from_end = [a - self.ndim if a >= 0 else a for a in axes]
        return tuple(self.ndim + moved.get(a, a) for a in from_end)

    def astype(self, dtype: jax.typing.DTypeLike) -> "QTensor":
        """The same codes, dequantizing to another dtype."""
        values = None if self.values is None else self.values.astype(dtype)
        return dataclasses.replace(self, values=values, dtype=jnp.dtype(dtype))

    def reorder(self, order: tuple[int, ...] | None) -> "QTensor":
        """The same array, its trailing axes stored in another order (see `order`).

        Raises:
            ValueError: `order` is not a permutation of -len(order) .. -1, or is too long.
        """
        wanted = range(-len(order or ()), 0)
        if sorted(order or ()) != list(wanted) or len(wanted) > self.ndim:
            raise ValueError(
                "order must be a permutation of -r .. -1 with r at most the number of axes; "
                f"got {order} for {self.ndim} axes. (-1, -2) swaps the last two."
            )
        is_moved = list(order or ()) != list(wanted)
        target = dataclasses.replace(self, order=tuple(order) if order and is_moved else None)
        # Where each stored axis of the result lies in the present one.
        logical = np.argsort(target.stored_axes(range(self.ndim)))
        return target._move_axes(self.stored_axes(logical.tolist()))

    def _move_axes(self, permutation):
        """Transposes everything stored; the caller has set `order`."""
        scale, zero_point = self.scale, self.zero_point
        return dataclasses.replace(
            self,
            codes=self.codes.transpose(permutation),
            scale=scale._move_axes(permutation)
            if isinstance(scale, QTensor)
            else scale.transpose(permutation),
            zero_point=None if zero_point is None else zero_point.transpose(permutation),
            values=None if self.values is None else self.values.transpose(permutation),
        )

    def dequantize(self) -> jax.Array:
        """Returns (codes - zero_point) * scale in the array's own shape and dtype."""
        return self.decode().transpose(self.stored_axes(range(self.ndim)))

    def decode(self) -> jax.Array:
        """`dequantize` with the axes left as they are stored. Codes get no gradient."""
        if self.values is not None:
            return self.values
        scale = scale_values(self.scale)
        scale = jnp.where(jnp.isinf(scale), jnp.nan, scale)
        blocks = blocks_between(self.codes.shape, scale.shape)
        # Some codes are floats, which JAX would differentiate.
        codes, _ = split(jax.lax.stop_gradient(self.codes), blocks)
        zero_point = self.zero_point
        if zero_point is not None:
            zero_point = to_blocks(zero_point, blocks)
        values = affine.decode(codes, to_blocks(scale, blocks), zero_point, self.format)
        # Half a step beyond the largest number of a dtype is still that number, not Inf.
        largest = float(min(jnp.finfo(self.dtype).max, jnp.finfo(values.dtype).max))
        values = jnp.clip(values, -largest, largest)
        return values.reshape(self.codes.shape).astype(self.dtype)

    def __repr__(self) -> str:
        if not hasattr(self.codes, "shape"):
            # JAX fills pytrees with placeholders, and prints them in its errors.
            return f"QTensor({self.format}, codes={self.codes!r}, scale={self.scale!r})"
        shape = "x".join(map(str, self.shape))
        return f"QTensor({self.format} {shape}, scale {self.scale.shape}, {self.dtype})"


class Deferred(abc.ABC):
    """A float array that is quantized anew by each operation that it is given to.

    Operations take it wherever they take a QTensor, compute with what `quantize` returns, as
    they would with any QTensor, and pass gradients on to its `values`.
    """

    @abc.abstractmethod
    def quantize(self) -> QTensor:
        """The array as a QTensor with `values`."""

    def convert(self) -> QTensor:
        """The array as a QTensor to keep: the same, without `values` and so without gradients."""
        return dataclasses.replace(self.quantize(), values=None)


def dequantize(x: QTensor) -> jax.Array:
    """Returns (codes - zero_point) * scale: `x.dequantize()` as a function, for `jax.jit`."""
    return x.dequantize()


def scale_values(scale: jax.Array | QTensor) -> jax.Array:
    """The scales as plain floats: float64 if they are stored so, else float32.

    Scales of 16 bits or more get a gradient; narrower dtypes cannot hold one.
    """
    if isinstance(scale, QTensor):
        return scale.decode()
    if bits_of(scale.dtype) < 16:
        scale = jax.lax.stop_gradient(scale)
    return scale if scale.dtype == jnp.float64 else scale.astype(jnp.float32)


def packed_bytes(x: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Bytes that an array takes in device memory, where 4-bit elements lie two to a byte."""
    is_number = jnp.issubdtype(x.dtype, jnp.integer) or jnp.issubdtype(x.dtype, jnp.floating)
    bits = bits_of(x.dtype) if is_number else 8 * x.dtype.itemsize
    return -(-math.prod(x.shape) * bits // 8)
