"""The quantized array."""

import abc
import dataclasses
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import affine
from .block_rotation import BlockRotation
from .blocks import blocks_between, join, split, to_blocks
from .config import ArrayConfig
from .formats import Format, bits_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """How activations are quantized before they are multiplied with a QTensor. A pytree.

        x  ->  x[..., permutation]  ->  x * multiplier  ->  x R  ->  quantized with `config`

    Invariants (not checked, because JAX rebuilds pytrees with tracers as fields):

    - `scale` and `zero_point` are scalars, and are used only if `config` is given;
    - `zero_point` is None if `scale` is None or `config` is symmetric;
    - `multiplier` has one element per contracted channel of the QTensor;
    - `permutation` is given only for a QTensor that is contracted along one axis, and is a
      permutation of the indices of that axis;
    - `rotation` has one sign per contracted channel of the QTensor.

    Attributes:
        config: how to quantize the activations, with scales shared along the contracted axes;
            None leaves them in float. Static.
        scale: calibrated (static) scale of all activations, a scalar; None computes dynamic
            scales in every matrix multiplication.
        zero_point: calibrated zero point of asymmetric activations, a scalar; None for zero.
        multiplier: one factor per contracted channel (1/s in SmoothQuant and AWQ). Its shape is
            that of the contracted axes of the QTensor, in their order; for a convolution, one
            factor per input channel. None for no multiplier.
        permutation: reorders the contracted channels of the activations, int32 (K,): the QTensor
            holds row `permutation[k]` of a kernel (K, N) as its row k, so that rows of the same
            group are neighbours ("act-order" in GPTQ). None for no permutation.
        rotation: R, an orthogonal matrix that the activations are multiplied with; the QTensor
            holds R^T W of a kernel W (K, N). None for no rotation.
        tap: function that gets the activations before they are quantized, as `ops.Activations`, and
            returns None or a function of the result; None for none.

    Example:
        >>> import dataclasses
        >>> w = jq.quantize(jnp.ones((4, 2)), jq.W8A8.weights)
        >>> w = dataclasses.replace(w, inputs=jq.Inputs(jq.W8A8.inputs))
        >>> jq.matmul(jnp.ones((1, 4)), w).round(3).tolist()
        [[4.0, 4.0]]
    """

    config: ArrayConfig | None = dataclasses.field(default=None, metadata={"static": True})
    scale: jax.Array | None = None
    zero_point: jax.Array | None = None
    multiplier: jax.Array | None = None
    permutation: jax.Array | None = None
    rotation: BlockRotation | None = None
    tap: Any = None

    @property
    def changes_weight(self) -> bool:
        """Whether the QTensor stands for another array than its dequantized values."""
        return self.changing_field is not None

    @property
    def changing_field(self) -> str | None:
        """The field because of which it does: "permutation", "multiplier" or "rotation"."""
        names = ("permutation", "multiplier", "rotation")
        return next((name for name in names if getattr(self, name) is not None), None)


class ArrayLike(abc.ABC):
    """Base class of pytrees that represent one array. Derives ndim, size and nbytes."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the represented array."""

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
        """Bytes of all its arrays in device memory, with sub-byte elements packed."""
        return sum(packed_bytes(x) for x in jax.tree.leaves(self))

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Raises TypeError; NumPy would otherwise make an array of dtype object."""
        raise TypeError(f"A {type(self).__name__} is not an array; got {self!r}. {_INSTEAD}")

    def __jax_array__(self) -> jax.Array:
        """Raises TypeError when it is passed to a function of jax.numpy."""
        raise TypeError(f"A {type(self).__name__} is not an array; got {self!r}. {_INSTEAD}")


_INSTEAD = (
    "Multiply with jq.matmul or jq.einsum, look up rows with jq.take, or convert it to a float "
    "array with q.dequantize(). jq.lift(fn) accepts it as an argument of any function of arrays."
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QTensor(ArrayLike):
    """A quantized array: x ~ (codes - zero_point) * scale + offset. A pytree.

    Invariants (not checked, because JAX rebuilds pytrees with tracers and placeholders as
    fields):

    - `codes` has the dtype of `format`, and its trailing axes are stored in the order `order`;
    - `scale`, `zero_point` and `offset` have the rank and the axis order of `codes`, and one
      element per block of codes: the length of each axis divides that of `codes`;
    - `zero_point` and `offset` have the shape of `scale`;
    - `scale` and `offset` are arrays or, if they are quantized too, QTensors;
    - a block that contained NaN or Inf has a NaN scale;
    - `values` is None or has the shape of `codes` and equals the decoded codes.

    Attributes:
        codes: the stored codes.
        scale: quantization step, in units of x per code.
        zero_point: the code of 0.0, in units of codes; None if it is zero.
        offset: what is added to each element, in units of x; None for zero. GGUF and MLX files have
            offsets, and `methods.HQQ` chooses them; `quantize` does not produce any.
        inputs: how activations are quantized before they are multiplied with this array; None
            leaves them in float.
        values: in training, the decoded codes, which receive the gradients (see `TrainedArray`);
            None otherwise.
        format: number format of the codes, static.
        dtype: dtype of the dequantized array, static.
        order: storage order of the trailing axes, counted from the end: (-1, -2) stores the last
            two axes swapped. None for the logical order. Static. Axes elsewhere in the library
            are logical axes: those of the array that was quantized.

    Example:
        >>> q = jq.quantize(jnp.arange(8.0).reshape(4, 2), jq.ArrayConfig(format=jq.INT8), axis=0)
        >>> q
        QTensor(int8 4x2, scale (1, 2), float32)
        >>> q.codes.tolist()
        [[0, 18], [42, 54], [85, 91], [127, 127]]
    """

    codes: jax.Array
    scale: "jax.Array | QTensor"
    zero_point: jax.Array | None = None
    offset: "jax.Array | QTensor | None" = None
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
        """The axes of `codes`, counted from 0, that store the given logical axes."""
        order = self.order or ()
        moved = {a: i - len(order) for i, a in enumerate(order)}
        from_end = [a - self.ndim if a >= 0 else a for a in axes]
        return tuple(self.ndim + moved.get(a, a) for a in from_end)

    def astype(self, dtype: jax.typing.DTypeLike) -> "QTensor":
        """Returns the same codes with another dtype to dequantize to."""
        values = None if self.values is None else self.values.astype(dtype)
        return dataclasses.replace(self, values=values, dtype=jnp.dtype(dtype))

    def reorder(self, order: tuple[int, ...] | None) -> "QTensor":
        """Returns the same array with its trailing axes stored in another order (see `order`).

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
        # For each stored axis of the result, the stored axis of self.
        logical = np.argsort(target.stored_axes(range(self.ndim)))
        return target._move_axes(self.stored_axes(logical.tolist()))

    def _move_axes(self, permutation):
        """Transposes all stored arrays; the caller has set `order`."""

        def moved(x):
            if isinstance(x, QTensor):
                return x._move_axes(permutation)
            return None if x is None else x.transpose(permutation)

        return dataclasses.replace(
            self,
            codes=moved(self.codes),
            scale=moved(self.scale),
            zero_point=moved(self.zero_point),
            offset=moved(self.offset),
            values=moved(self.values),
        )

    def dequantize(self) -> jax.Array:
        """Returns (codes - zero_point) * scale + offset in the shape and dtype of the array."""
        return self.decode().transpose(self.stored_axes(range(self.ndim)))

    def decode(self) -> jax.Array:
        """`dequantize` with the axes in storage order. Codes get no gradient."""
        if self.values is not None:
            return self.values
        return _decode(dataclasses.replace(self, inputs=None))

    def __repr__(self) -> str:
        if not hasattr(self.codes, "shape"):
            # JAX puts placeholders into pytrees and prints them in error messages.
            return f"QTensor({self.format}, codes={self.codes!r}, scale={self.scale!r})"
        shape = "x".join(map(str, self.shape))
        return f"QTensor({self.format} {shape}, scale {self.scale.shape}, {self.dtype})"


@partial(jax.jit, inline=True)
def _decode(q):
    """`q.decode()` of a QTensor without `values`. One program when it runs eagerly."""
    scale = scale_values(q.scale)
    scale = jnp.where(jnp.isinf(scale), jnp.nan, scale)
    blocks = blocks_between(q.codes.shape, scale.shape)
    # JAX would differentiate floating-point codes.
    codes, _ = split(jax.lax.stop_gradient(q.codes), blocks)
    zero_point = None if q.zero_point is None else to_blocks(q.zero_point, blocks)
    values = affine.decode(codes, to_blocks(scale, blocks), zero_point, q.format)
    if q.offset is not None:
        offset = scale_values(q.offset).astype(values.dtype)
        values = values + to_blocks(jnp.where(jnp.isinf(offset), jnp.nan, offset), blocks)
    # A value that rounding moved above the largest finite number is that number, not Inf.
    largest = float(min(jnp.finfo(q.dtype).max, jnp.finfo(values.dtype).max))
    values = jnp.clip(values, -largest, largest)
    return join(values, q.codes.shape, blocks).astype(q.dtype)


class TrainedArray(abc.ABC):
    """A float array in training that every operation quantizes again.

    Operations accept it in place of a QTensor. They compute with the QTensor that `quantize`
    returns and pass gradients to its `values`.
    """

    @abc.abstractmethod
    def quantize(self) -> QTensor:
        """Returns the array as a QTensor with `values`."""

    def convert(self) -> QTensor:
        """Returns the array as a QTensor for inference, without `values` and hence gradients."""
        return dataclasses.replace(self.quantize(), values=None)


def dequantize(x: QTensor) -> jax.Array:
    """Dequantizes: (codes - zero_point) * scale + offset. The function form of `x.dequantize()`.

    Example:
        >>> q = jq.quantize(jnp.array([-127.0, 3.2, 5.9]), jq.ArrayConfig(format=jq.INT8))
        >>> jq.dequantize(q).tolist()
        [-127.0, 3.0, 6.0]
    """
    return x.dequantize()


def scale_values(scale: jax.Array | QTensor) -> jax.Array:
    """Scales (or offsets) in float64 if they are stored in float64, and in float32 otherwise.

    Scales of 16 bits or more get a gradient; narrower dtypes cannot represent gradients.
    """
    if isinstance(scale, QTensor):
        return scale.decode()
    if bits_of(scale.dtype) < 16:
        scale = jax.lax.stop_gradient(scale)
    return scale if scale.dtype == jnp.float64 else scale.astype(jnp.float32)


def packed_bytes(x: Any) -> int:
    """Bytes of an array or ShapeDtypeStruct in device memory, with two 4-bit elements per byte."""
    is_number = jnp.issubdtype(x.dtype, jnp.integer) or jnp.issubdtype(x.dtype, jnp.floating)
    bits = bits_of(x.dtype) if is_number else 8 * x.dtype.itemsize
    return -(-math.prod(x.shape) * bits // 8)
