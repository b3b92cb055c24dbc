"""How inputs are quantized anew in each product."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from ..core import FP8_E4M3, INT8, AbsMax, ArrayConfig, Axes, QTensor, block_shape, quantize
from ..jaxprs import Function, by_generation, is_sharded, on_one_cpu, on_one_tpu
from ..kernels import cpu, pallas_tpu

# Rows of inputs from which one pass over the memory beats XLA's two. 4096 x 4096, bfloat16,
# microseconds: v5e 62 against 336, v6e 31 against 190. Fewer are left to XLA, to fuse with what
# made them.
_LEAST_ROWS = {"v5e": 512, "v6e": 512}
# 32 rows of float32 must fit in VMEM several times.
_LONGEST_ROW = 2**16
_FORMATS = (INT8, FP8_E4M3)
_FLOATS = (jnp.float32, jnp.bfloat16)


def quantize_inputs(x: jax.Array, config: ArrayConfig, axis: Axes) -> QTensor:
    """`quantize`, in one pass over the memory where kernels of our own are faster."""
    branches = _branches_at_once(x, config, axis)
    if not branches:
        return quantize(x, config, axis)
    return lax.platform_dependent(x, **branches, default=lambda x: quantize(x, config, axis))


def quantize_rows(x: jax.Array, config: ArrayConfig, *, interpret: bool = False) -> QTensor:
    """Codes of 8 bits of (..., K), one scale per row; `interpret` does without a TPU, for tests."""
    rows = x.reshape(-1, x.shape[-1])
    qmin, qmax = (float(q) for q in config.bounds)
    codes, scale = pallas_tpu.quantize_rows(
        rows, qmin, qmax, config.format.dtype, interpret=interpret
    )
    scale = scale.reshape(*x.shape[:-1], 1)
    return QTensor(codes.reshape(x.shape), scale, format=config.format, dtype=x.dtype)


def quantize_rows_natively(x: jax.Array, config: ArrayConfig) -> QTensor:
    """Int8 codes of (..., K), one scale per row, by machine code for CPUs: `quantize`'s bits."""
    qmin, qmax = (int(q) for q in config.bounds)
    codes, scale = cpu.quantize_rows(x, qmin, qmax)
    return QTensor(codes, scale, format=config.format, dtype=x.dtype)


def _branches_at_once(x, config, axis):
    """What quantizes in one pass, by platform, where it can do what the config says and pays."""

    def by_xla(x):
        return quantize(x, config, axis)

    def at_once(x):
        return on_one_tpu(lambda x: quantize_rows(x, config), by_xla, x)

    def on_cpu(x):
        return on_one_cpu(lambda x: quantize_rows_natively(x, config), by_xla, x)

    def on_tpu(x):
        return by_generation(dict.fromkeys(chips, at_once), by_xla, x)

    if not _is_of_rows(x, config, axis):
        return {}
    rows, length = math.prod(x.shape[:-1]), x.shape[-1]
    chips = [c for c, least in _LEAST_ROWS.items() if rows >= least and length <= _LONGEST_ROW]
    branches: dict[str, Function] = {"tpu": on_tpu} if chips else {}
    # 2 cores, AVX512, float32, microseconds against those of XLA: 15 and 20 for 1 x 4096, 13 and 22
    # for 8 x 384, 1000 and 3200 for 512 x 4096; equal for 1 x 32 and 64 x 4096.
    if config.format == INT8 and cpu.unavailable() is None:
        branches["cpu"] = on_cpu
    return branches


def _is_of_rows(x, config, axis):
    """Whether the config asks for codes of 8 bits with one float32 scale per row."""
    if not isinstance(x, jax.Array) or x.dtype not in _FLOATS or is_sharded(x):
        return False
    if 0 in (x.ndim, x.size):
        return False
    is_plain = config.format in _FORMATS and (config.range, config.symmetric) == (AbsMax(), True)
    has_float32 = config.stored_scale_dtype == "float32"
    per_row = (*(1,) * (x.ndim - 1), x.shape[-1])
    return is_plain and has_float32 and block_shape(x.shape, config, axis) == per_row
