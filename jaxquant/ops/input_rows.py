"""Quantizes rows of activations, one scale for each, in one pass over memory."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core import FP8_E4M3, INT8, AbsMax, ArrayConfig, Axes, QTensor, block_shape, quantize
from ..jaxprs import (
    Function,
    by_generation,
    explicit_mesh,
    is_sharded,
    names_along,
    on_one_cpu,
    on_one_tpu,
    spec_of_type,
)
from ..kernels import cpu, pallas_tpu
from .operands import has_symbolic_shape

# Rows of activations up to which one kernel beats four small fusions of XLA, and from which one
# pass over the memory beats its two. 4096 x 4096, bfloat16, microseconds: v5e 62 against 336, v6e
# 31 against 190. Those between are left to XLA, to fuse with what made them.
_ROWS = {"v5e": (64, 512), "v6e": (64, 512)}
# 32 rows of float32 must fit in VMEM several times.
_LONGEST_ROW = 2**16
_FORMATS = (INT8, FP8_E4M3)
_FLOATS = (jnp.float32, jnp.bfloat16)


def quantize_inputs(x: jax.Array, config: ArrayConfig, axis: Axes, other: Any = None) -> QTensor:
    """`quantize`, in one pass over memory where kernels of this package are faster.

    If x or the other operand is sharded along explicit axes of a mesh, each device quantizes the
    rows that it has.
    """
    if not _is_of_rows(x, config, axis):
        return quantize(x, config, axis)
    mesh, spec = explicit_mesh(x, *jax.tree.leaves(other)), jax.P(*spec_of_type(x))
    if mesh is None:
        return _quantize_at_once(x, config, axis)
    run = partial(_quantize_at_once, config=config, axis=axis)
    return jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)(x)


def quantize_rows(x: jax.Array, config: ArrayConfig, *, interpret: bool = False) -> QTensor:
    """8-bit codes of (..., K), one scale per row; `interpret` runs without a TPU, for tests."""
    rows = x.reshape(-1, x.shape[-1])
    qmin, qmax = (float(q) for q in config.bounds)
    codes, scale = pallas_tpu.quantize_rows(
        rows, qmin, qmax, config.format.dtype, interpret=interpret
    )
    scale = scale.reshape(*x.shape[:-1], 1)
    return QTensor(codes.reshape(x.shape), scale, format=config.format, dtype=x.dtype)


def quantize_rows_natively(x: jax.Array, config: ArrayConfig) -> QTensor:
    """Int8 codes of (..., K), one scale per row, by a native kernel: the bits of `quantize`."""
    qmin, qmax = (int(q) for q in config.bounds)
    codes, scale = cpu.quantize_rows(x, qmin, qmax)
    return QTensor(codes, scale, format=config.format, dtype=x.dtype)


def _quantize_at_once(x: jax.Array, config: ArrayConfig, axis: Axes) -> QTensor:
    """Rows, in one pass on the platforms where that is supported and pays off."""

    def by_xla(x: jax.Array) -> QTensor:
        return quantize(x, config, axis)

    def at_once(x: jax.Array) -> QTensor:
        return on_one_tpu(lambda x: quantize_rows(x, config), by_xla, x)

    def on_cpu(x: jax.Array) -> QTensor:
        return on_one_cpu(lambda x: quantize_rows_natively(x, config), by_xla, x)

    def on_tpu(x: jax.Array) -> QTensor:
        return by_generation(dict.fromkeys(chips, at_once), by_xla, x)

    rows, length = math.prod(x.shape[:-1]), x.shape[-1]
    chips = [c for c, (few, many) in _ROWS.items() if not few < rows < many]
    chips = chips if length <= _LONGEST_ROW else []
    branches: dict[str, Function] = {"tpu": on_tpu} if chips else {}
    # 2 cores, AVX512, float32, microseconds against those of XLA: 15 and 20 for 1 x 4096, 13 and 22
    # for 8 x 384, 1000 and 3200 for 512 x 4096; equal for 1 x 32 and 64 x 4096.
    if config.format == INT8 and cpu.unavailable() is None:
        branches["cpu"] = on_cpu
    return lax.platform_dependent(x, **branches, default=by_xla) if branches else by_xla(x)


def _is_of_rows(x: jax.Array, config: ArrayConfig, axis: Axes) -> bool:
    """Whether devices hold whole rows, of which the config asks for 8-bit codes and one scale."""
    if not isinstance(x, jax.Array) or x.dtype not in _FLOATS or has_symbolic_shape(x):
        return False
    if 0 in (x.ndim, x.size) or names_along(x, x.ndim - 1):
        return False
    if is_sharded(x) and explicit_mesh(x) is None:
        return False
    is_plain = config.format in _FORMATS and (config.range, config.symmetric) == (AbsMax(), True)
    has_float32 = config.stored_scale_dtype == "float32"
    per_row = (*(1,) * (x.ndim - 1), x.shape[-1])
    return is_plain and has_float32 and block_shape(x.shape, config, axis) == per_row
