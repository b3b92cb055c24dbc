"""Products with one weight matrix per group of rows, as in mixtures of experts."""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import QTensor, scale_values
from . import dispatch
from .dispatch import Implementation
from .operands import (
    AxesOfBoth,
    Operand,
    OperandLike,
    as_array,
    result_dtype,
    stored_axes,
    why_unsupported_codes,
    why_unsupported_length,
    without_adapters,
)
from .rows import cpu_ragged, tpu_ragged
from .stacks import has_plain_scales, stack_of


@dataclasses.dataclass(frozen=True)
class RaggedSpec:
    """The arguments of `ragged_dot`. Hashable unless it holds arrays.

    Attributes:
        rhs_axes: where the (group, k, n) axes of rhs are stored.
        dtype: dtype of the result.
        precision: as for `jax.lax.ragged_dot`.
        group_sizes, group_offset: the arrays, in the copy that is passed to the computation.
        stack, layer: of which rhs is a slice, for kernels that read it in place; None if rhs is
            not a slice.
    """

    rhs_axes: tuple[int, ...]
    dtype: np.dtype
    precision: lax.PrecisionLike
    group_sizes: jax.Array | None = None
    group_offset: jax.Array | None = None
    stack: QTensor | None = None
    layer: jax.Array | None = None

    operation: ClassVar[str] = "ragged_dot"

    @property
    def contract(self) -> AxesOfBoth:
        """The axis k of both operands."""
        return (1,), (self.rhs_axes[1],)

    @property
    def channels(self) -> AxesOfBoth:
        """A multiplier has one factor per element of k."""
        return self.contract

    @property
    def batch(self) -> AxesOfBoth:
        """None: rows in groups are not a batch."""
        return (), ()

    @property
    def arrays(self) -> tuple[Any, ...]:
        """Those of groups and of the stack."""
        return self.group_sizes, self.group_offset, self.stack, self.layer

    def with_arrays(
        self,
        group_sizes: jax.Array | None,
        group_offset: jax.Array | None,
        stack: QTensor | None,
        layer: jax.Array | None,
    ) -> "RaggedSpec":
        """The spec with the arrays of groups and of the stack."""
        return RaggedSpec(
            self.rhs_axes, self.dtype, self.precision, group_sizes, group_offset, stack, layer
        )

    def in_place(self, rhs: QTensor) -> tuple[QTensor, jax.Array]:
        """Experts, and rows of each: of the whole stack, or rhs and its own.

        The latter if rhs is not a slice, or kernels do not read its scales in the stack.
        """
        stack = self.stack
        if stack is None or stack.offset is not None:
            return rhs, jnp.asarray(self.group_sizes)
        if not has_plain_scales(stack, (0, 1, *stack.stored_axes([3]))):
            return rhs, jnp.asarray(self.group_sizes)
        return _joined(stack), self.sizes_in_stack

    def codes_in_place(self, rhs: QTensor) -> tuple[jax.Array, jax.Array]:
        """The codes of `in_place` with any scales, of all layers, and rows of each matrix."""
        if self.stack is None:
            return rhs.codes, jnp.asarray(self.group_sizes)
        return _joined(self.stack.codes), self.sizes_in_stack

    @property
    def sizes_in_stack(self) -> jax.Array:
        """Rows of the experts of all layers: those of other layers have none."""
        assert self.stack is not None, "rhs is a slice"
        assert self.layer is not None, "it has a place"
        sizes = jnp.asarray(self.group_sizes)
        count = sizes.shape[0]
        every = jnp.zeros(self.stack.codes.shape[0] * count, sizes.dtype)
        return lax.dynamic_update_slice(every, sizes, (self.layer * count,))

    def with_unquantized(self, rows: jax.Array | None) -> "RaggedSpec":
        """The spec itself: no kernel quantizes rows."""
        return self

    def unfold(self, x: jax.Array, weights: QTensor) -> jax.Array:
        """The operand itself: its rows have all elements of a sum."""
        return x

    def length(self, lhs: Operand, rhs: Operand) -> int:
        """Products that are added for one element of the result."""
        return lhs.shape[1]

    def rows(self, lhs: Operand, rhs: Operand) -> None:
        """One matrix per group of rows."""

    def shares(self, lhs: Operand, rhs: Operand) -> None:
        """None: XLA partitions what kernels do not divide themselves."""

    def convolution(self, lhs: Operand, rhs: Operand) -> None:
        """None: it is a product."""

    def run(self, lhs: Any, rhs: Any, dtype: jax.typing.DTypeLike | None) -> jax.Array:
        """The product of plain arrays, with rhs in its stored axis order."""
        group, inner, _ = self.rhs_axes
        numbers = lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((1,), (inner,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[group],
        )
        return lax.ragged_dot_general(
            lhs,
            rhs,
            jnp.asarray(self.group_sizes),
            numbers,
            precision=self.precision,
            preferred_element_type=dtype,
            group_offset=self.group_offset,
        )


def ragged_dot(
    lhs: OperandLike,
    rhs: OperandLike,
    group_sizes: jax.Array | np.ndarray,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    group_offset: jax.Array | None = None,
    *,
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot` on arrays and QTensors, in any mixture.

        out[i, n] = sum over k of lhs[i, k] * rhs[group of row i, k, n]

    Symmetric integer codes are multiplied as integers unless scales are grouped along k.
    If a QTensor has `inputs`, the float operand it is multiplied with is quantized accordingly
    first. On CPU and TPU, kernels read the experts that have rows, as they are stored, where XLA
    multiplies all rows by all experts.

    Args:
        lhs: (M, K), rhs: (G, K, N); float arrays or QTensors.
        group_sizes: (G,) integers: rows of lhs in each group, in order. Rows beyond
            their sum give zeros.
        precision, group_offset: as for `jax.lax.ragged_dot`.
        layer: index of a slice rhs[layer] of a stack (L, G, K, N). In a loop over layers,
            kernels read a stack that is closed over where it is, as they do slices that
            `jq.scan` takes; those of other loops would be copied.
        preferred_element_type: floating dtype of the result; None for the promoted dtype.
        implementation: "native" (on CPU), "pallas" (on TPU), "integer" or "dequantize", to force
            one; None to select automatically.

    Returns:
        Array (M, N).

    Raises:
        ValueError: `implementation` cannot run these operands, or a dtype is not floating-point.

    Gradients and error: as for `dot_general`.
    Source: Jacob et al. 2018, arXiv:1712.05877, eq. 7.

    Example:
        >>> experts = jq.quantize(jnp.ones((2, 8, 4)), jq.ArrayConfig(), axis=1)
        >>> jq.ragged_dot(jnp.ones((5, 8)), experts, jnp.array([2, 3])).shape
        (5, 4)
    """
    left, right = without_adapters((lhs, rhs), implementation)
    what = "(G, K, N)" if layer is None else "in a stack (L, G, K, N), because `layer` is given"
    if right.ndim != (3 if layer is None else 4):
        raise ValueError(f"ragged_dot needs experts {what}; got shape {right.shape}.")
    if layer is not None and not isinstance(right, QTensor):
        right, layer = lax.dynamic_index_in_dim(right, layer, keepdims=False), None
    if not (isinstance(left, QTensor) or isinstance(right, QTensor)):
        return lax.ragged_dot(
            jnp.asarray(left),
            jnp.asarray(right),
            jnp.asarray(group_sizes),
            precision,
            preferred_element_type,
            group_offset,
        )
    # XLA's ragged products require the rows of the left operand first.
    left = left.reorder(None) if isinstance(left, QTensor) else left
    if isinstance(right, QTensor) and layer is not None and right.stored_axes([0]) != (0,):
        right = right.reorder(None)
    axes = stored_axes(right, (-3, -2, -1))
    axes = tuple(a - min(axes) for a in axes)
    spec = RaggedSpec(axes, result_dtype(left, right, preferred_element_type), precision)
    found = (None, jnp.asarray(layer)) if layer is not None else stack_of(right) or (None, None)
    return _ragged_dot(left, right, group_sizes, group_offset, *found, spec, implementation)


@partial(jax.jit, static_argnames=("spec", "implementation"))
def _ragged_dot(
    lhs: Operand,
    rhs: Any,
    group_sizes: jax.Array,
    group_offset: jax.Array | None,
    stack: QTensor | None,
    layer: jax.Array | None,
    spec: RaggedSpec,
    implementation: str | None,
) -> jax.Array:
    if layer is not None and stack is None:
        layer = jnp.where(layer < 0, layer + rhs.shape[0], layer)
        layer = jnp.clip(layer, 0, rhs.shape[0] - 1)
        stack = dataclasses.replace(rhs, inputs=None, values=None)
        # Dead code where a kernel reads the stack.
        rhs = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, layer, keepdims=False), rhs)
    arrays = group_sizes, group_offset, stack, layer
    return dispatch.run(_TABLE, lhs, rhs, spec, implementation, *arrays)


def _joined(stack: Any) -> Any:
    """Leaves (L, G, ...) as (L * G, ...)."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stack)


def _dequantized(lhs: Operand, rhs: Operand, spec: RaggedSpec) -> jax.Array:
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    return spec.run(as_array(lhs).astype(dtype), as_array(rhs).astype(dtype), spec.dtype)


def _integer(lhs: QTensor, rhs: QTensor, spec: RaggedSpec) -> jax.Array:
    acc = spec.run(lhs.codes.astype(jnp.int8), rhs.codes.astype(jnp.int8), jnp.int32)
    compute = jnp.float64 if spec.dtype == jnp.float64 else jnp.float32
    group, _, column = spec.rhs_axes
    scale = scale_values(rhs.scale).astype(compute)
    scale = scale.transpose(group, column, 3 - group - column).squeeze(-1)
    sizes = jnp.asarray(spec.group_sizes)
    ends = jnp.cumsum(sizes)
    rows = jnp.arange(lhs.shape[0], dtype=ends.dtype)
    if scale.shape[0] > 1:
        groups = jnp.searchsorted(ends, rows, side="right")
        block = rhs.codes.shape[group] // scale.shape[0]
        scale = jnp.take(scale, groups // block, 0, mode="clip")
    columns = rhs.codes.shape[column]
    scale = jnp.repeat(scale, columns // scale.shape[1], 1) if scale.shape[1] > 1 else scale
    out = acc.astype(compute) * scale_values(lhs.scale).astype(compute) * scale
    # Rows beyond the last group are zeros, also where a scale is NaN.
    return jnp.where(rows[:, None] < jnp.sum(sizes), out, 0).astype(spec.dtype)


def _why_integer_unsupported(lhs: Any, rhs: Any, spec: RaggedSpec) -> str | None:
    for x, inner in ((lhs, 1), (rhs, spec.rhs_axes[1])):
        why_not = why_unsupported_codes(x)
        if why_not is not None or x.zero_point is not None:
            return why_not or "ragged sums do not support zero points"
        if x.scale.shape[inner] > 1:
            return f"scales {x.scale.shape} change along the contracted axis"
    if lhs.scale.shape[0] not in (1, lhs.shape[0]):
        return f"rows of the left operand share scales {lhs.scale.shape}"
    if spec.group_offset is not None:
        return "group_offset moves the groups"
    return why_unsupported_length(rhs.codes.shape[spec.rhs_axes[1]], lhs, rhs)


_BY_XLA = (
    Implementation("integer", _integer, _why_integer_unsupported, is_integer=lambda *_: True),
    Implementation("dequantize", _dequantized, lambda lhs, rhs, spec: None),
)
_TABLE = (cpu_ragged.row(_BY_XLA), tpu_ragged.row(_BY_XLA), *_BY_XLA)
