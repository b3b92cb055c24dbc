"""How inputs are quantized anew in each product."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from ..core import FP8_E4M3, INT8, AbsMax, ArrayConfig, QTensor, block_shape, quantize
from ..kernels import pallas_tpu
from .chips import by_generation
from .lowering import on_one_tpu
from .sharding import is_sharded

# Rows of inputs from which one pass over the memory beats XLA's two. 4096 x 4096, bfloat16,
# microseconds: v5e 62 against 336, v6e 31 against 190. Fewer are left to XLA, to fuse with what
# made them.
_LEAST_ROWS = {"v5e": 512, "v6e": 512}
# 32 rows of float32 must fit in VMEM several times.
_LONGEST_ROW = 2**16
_FORMATS = (INT8, FP8_E4M3)
_FLOATS = (jnp.float32, jnp.bfloat16)


def quantize_inputs(x: jax.Array, config: ArrayConfig) -> QTensor:
    """`quantize`, in one pass over the memory on TPUs where `quantize_rows` is faster."""
    if not _quantizes_at_once(x, config):
        return quantize(x, config)

    def by_xla(x):
        return quantize(x, config)

    def at_once(x):
        return on_one_tpu(lambda x: quantize_rows(x, config), by_xla, x)

    def on_tpu(x):
        rows = math.prod(x.shape[:-1])
        able = {chip: at_once for chip, least in _LEAST_ROWS.items() if rows >= least}
        return by_generation(able, by_xla, x)

    return lax.platform_dependent(x, tpu=on_tpu, default=by_xla)


def quantize_rows(x: jax.Array, config: ArrayConfig, *, interpret: bool = False) -> QTensor:
    """Codes of 8 bits of (..., K), one scale per row; `interpret` does without a TPU, for tests."""
    rows = x.reshape(-1, x.shape[-1])
    qmin, qmax = (float(q) for q in config.bounds)
    codes, scale = pallas_tpu.quantize_rows(
        rows, qmin, qmax, config.format.dtype, interpret=interpret
    )
    scale = scale.reshape(*x.shape[:-1], 1)
    return QTensor(codes.reshape(x.shape), scale, format=config.format, dtype=x.dtype)


def _quantizes_at_once(x, config):
    """Whether `quantize_rows` can do what the config says, and is faster on some TPU."""
    if not isinstance(x, jax.Array) or x.dtype not in _FLOATS or is_sharded(x):
        return False
    rows = math.prod(x.shape[:-1])
    if rows < min(_LEAST_ROWS.values()) or not 0 < x.shape[-1] <= _LONGEST_ROW:
        return False
    is_plain = config.format in _FORMATS and (config.range, config.symmetric) == (AbsMax(), True)
    has_float32 = config.stored_scale_dtype == "float32"
    per_row = (*(1,) * (x.ndim - 1), x.shape[-1])
    return is_plain and has_float32 and block_shape(x.shape, config) == per_row
