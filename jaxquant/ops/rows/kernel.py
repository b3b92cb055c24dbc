"""Shared code of the rows that run kernels of this package."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...core import QTensor, blocks_between, scale_values
from ...jaxprs import Function, is_sharded, on_each_cpu
from ...kernels import cpu
from ...version import __version__
from .. import dispatch
from ..dispatch import Table
from ..dot_spec import DotSpec
from ..operands import Operand, why_unsupported_codes
from .parts import run_on_parts

Arrays = tuple[jax.Array | None, ...]


def kernel_or_xla(
    lhs: Operand,
    rhs: Operand,
    spec: Any,
    *,
    kernel: Callable[..., jax.Array],
    where: Callable[..., jax.Array],
    fallback: Table,
    platform: str,
) -> jax.Array:
    """Runs the kernel in programs that may hold it, and a row of `fallback` in others.

    Args:
        lhs, rhs, spec: as for the row.
        kernel: (lhs, rhs, spec) -> result.
        where: (here, elsewhere, lhs, rhs, arrays) -> result, which selects when the program is
            lowered.
        fallback: rows of XLA, tried in order.
        platform: that of the kernel.
    """

    # The branches get all arrays as arguments.
    def here(lhs: Operand, rhs: Operand, arrays: Arrays) -> jax.Array:
        return kernel(lhs, rhs, spec.with_arrays(*arrays))

    def elsewhere(lhs: Operand, rhs: Operand, arrays: Arrays) -> jax.Array:
        return dispatch.run_on(fallback, lhs, rhs, spec.with_arrays(*arrays), platform)

    return where(here, elsewhere, lhs, rhs, spec.arrays)


def kernel_on_parts(
    lhs: Operand,
    rhs: QTensor,
    spec: DotSpec,
    *,
    kernel: Callable[..., jax.Array],
    why_unsupported: Callable[..., str | None],
    fallback: Table,
) -> jax.Array:
    """`kernel_or_xla` for CPUs; each runs the kernel on its part of what XLA partitions.

    Args:
        lhs, rhs, spec, kernel, fallback: as for `kernel_or_xla`.
        why_unsupported: (lhs, rhs, spec) -> why the kernel does not multiply such parts, or None.
    """

    of_part = spec.with_arrays(None, None)

    def by_xla(lhs: Operand, rhs: QTensor, spec: DotSpec) -> jax.Array:
        return dispatch.run_on(fallback, lhs, rhs, spec, "cpu")

    def on_part(lhs: Operand, rhs: QTensor, spec: DotSpec) -> jax.Array:
        run = kernel if why_unsupported(lhs, rhs, spec) is None else by_xla
        return run(lhs, rhs, spec)

    def where(here: Function, elsewhere: Function, *args: Any) -> jax.Array:
        treedef = jax.tree.structure(args)

        @jax.custom_batching.custom_vmap
        def parts(*leaves: jax.Array) -> jax.Array:
            lhs, rhs, _ = jax.tree.unflatten(treedef, leaves)
            key = f"{__version__} {cpu.instruction_sets()[0]}"
            return run_on_parts(lhs, rhs, of_part, on_part, key)

        @parts.def_vmap
        def _(length: int, is_batched: Any, *leaves: jax.Array) -> tuple[jax.Array, bool]:
            axes = jax.tree.unflatten(treedef, [0 if b else None for b in is_batched])
            operands = jax.tree.unflatten(treedef, leaves)
            return jax.vmap(elsewhere, axes, axis_size=length)(*operands), True

        def on_parts(*args: Any) -> jax.Array:
            return parts(*jax.tree.leaves(args))

        return on_each_cpu(here, on_parts, elsewhere, *args)

    return kernel_or_xla(
        lhs, rhs, spec, kernel=kernel, where=where, fallback=fallback, platform="cpu"
    )


def why_unsupported_matrix(lhs: Operand, rhs: Operand, spec: DotSpec, axis: int) -> str | None:
    """Why this is not rows times a matrix stored with `axis` contracted, on one device; or None."""
    if not isinstance(rhs, QTensor):
        return "the right operand is not quantized"
    if spec.batch[1] or (rhs.codes.ndim, spec.contract[1]) != (2, (axis,)):
        place = ("first", "last")[axis]
        return f"the right operand is not stored as a matrix whose {place} axis is contracted"
    if spec.contract[0] != (lhs.ndim - 1,):
        return "the left operand is not contracted along its last axis alone"
    return why_unsupported_shardings(lhs, rhs, spec)


def why_unsupported_shardings(lhs: Operand, rhs: Operand, spec: Any) -> str | None:
    """Why kernels, which have no axes of a mesh, do not get these operands; or None."""
    leaves = jax.tree.leaves((lhs, rhs))
    if spec.out_sharding is not None or any(is_sharded(x) for x in leaves):
        return "the kernels do not support sharded arrays"
    return None


def why_unsupported_experts(
    lhs: Operand, rhs: Operand, spec: Any, axes: tuple[int, ...]
) -> str | None:
    """Why these are not rows times quantized experts (G, K, N) stored as `axes`, on one device."""
    if not isinstance(rhs, QTensor):
        return "the right operand is not quantized"
    if spec.rhs_axes != axes:
        last = ("columns", "the contracted axis")[axes[1] == 2]
        return f"the experts are not stored with {last} last"
    if spec.group_offset is not None:
        return "group_offset moves the groups"
    if rhs.offset is not None or jnp.float64 in (spec.dtype, lhs.dtype):
        return "the result is float64, or an offset is added to the codes"
    if any(is_sharded(x) for x in jax.tree.leaves((lhs, rhs))):
        return "the kernels do not support sharded arrays"
    return None


def why_unsupported_float64(spec: DotSpec) -> str | None:
    """Why kernels that compute in float32 cannot give the result, or None."""
    return "the result is float64" if spec.dtype == jnp.float64 else None


@dataclasses.dataclass(frozen=True)
class FloatSupport:
    """Which floating-point operands the kernels of one platform multiply.

    Attributes:
        dtypes: of both operands, or of what their codes dequantize to.
        precisions: those at which float32 is multiplied, the highest of them last.
    """

    dtypes: tuple[jax.typing.DTypeLike, ...]
    precisions: tuple[lax.PrecisionLike, ...]

    def why_unsupported(
        self, lhs: Operand, rhs: QTensor, precision: lax.PrecisionLike
    ) -> str | None:
        """Why these operands are not supported, or None; a `precision` of None is JAX's default."""
        if lhs.dtype not in self.dtypes or rhs.dtype not in self.dtypes:
            names = " or ".join(jnp.dtype(d).name for d in self.dtypes)
            return f"{lhs.dtype} by {rhs.dtype} are not {names}"
        if jnp.float32 in (lhs.dtype, rhs.dtype):
            default = jax.default_matmul_precision.value
            wanted = precision if isinstance(precision, tuple) else (precision or default,)
            if any(p not in self.precisions for p in wanted):
                return f"a precision of {precision or default} is more than {self.precisions[-1]}"
        return "an operand is empty" if 0 in (*lhs.shape, *rhs.codes.shape) else None


def why_unsupported_int4(rhs: QTensor) -> str | None:
    """Why the codes of these weights are not 4-bit integers, or None."""
    if rhs.format.bits == 4 and rhs.format.rounds:
        return None
    return f"{rhs.format} codes are not 4-bit integers"


def codes_and_scale(lhs: Operand) -> tuple[jax.Array, jax.Array | None]:
    """Codes of the left operand and their scales per row, or its values and None."""
    if not isinstance(lhs, QTensor):
        return jnp.asarray(lhs), None
    blocks = blocks_between(lhs.codes.shape, lhs.scale.shape)
    is_per_row = all(b in (1, n) for b, n in zip(blocks, lhs.codes.shape, strict=True))
    is_plain = why_unsupported_codes(lhs) is None and lhs.zero_point is None and is_per_row
    if is_plain and lhs.scale.shape[-1] == 1:
        return lhs.codes, scale_values(lhs.scale)
    return lhs.decode(), None
