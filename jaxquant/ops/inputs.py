"""How inputs are quantized anew in each product."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from ..core import INT8, AbsMax, ArrayConfig, QTensor, block_shape, quantize
from ..kernels import native, pallas_tpu
from . import chips
from .lowering import on_one_cpu, on_one_tpu
from .sharding import is_sharded

# Rows of inputs from which one pass over the memory beats XLA's two. 4096 x 4096, bfloat16,
# microseconds: v5e 62 against 336, v6e 31 against 190. Fewer are left to XLA, to fuse with what
# made them.
_LEAST_ROWS: dict[str | None, int] = {"v5e": 512, "v6e": 512}
# 32 rows of float32 must fit in VMEM several times.
_LONGEST_ROW = 2**16
_FLOATS = (jnp.float32, jnp.bfloat16)


def quantize_inputs(x: jax.Array, config: ArrayConfig) -> QTensor:
    """`quantize`, in one pass over the memory where kernels of our own are faster."""

    def by_xla(x):
        return quantize(x, config)

    def on_tpu(x):
        return on_one_tpu(lambda x: quantize_rows(x, config), by_xla, x)

    def on_cpu(x):
        return on_one_cpu(lambda x: quantize_rows_natively(x, config), by_xla, x)

    if not _is_of_rows(x, config):
        return quantize(x, config)
    branches = {"tpu": on_tpu} if _pays_on_tpu(x) else {}
    branches |= {"cpu": on_cpu} if _pays_on_cpu() else {}
    return lax.platform_dependent(x, **branches, default=by_xla) if branches else by_xla(x)


def quantize_rows(x: jax.Array, config: ArrayConfig, *, interpret: bool = False) -> QTensor:
    """Int8 codes of (..., K), one scale per row; `interpret` does without a TPU, for tests."""
    rows = x.reshape(-1, x.shape[-1])
    codes, scale = pallas_tpu.quantize_rows(rows, *_bounds(config), interpret=interpret)
    scale = scale.reshape(*x.shape[:-1], 1)
    return QTensor(codes.reshape(x.shape), scale, format=config.format, dtype=x.dtype)


def quantize_rows_natively(x: jax.Array, config: ArrayConfig) -> QTensor:
    """The same by machine code for CPUs, with the bits of `quantize`."""
    codes, scale = native.quantize_rows(x, *_bounds(config))
    return QTensor(codes, scale, format=config.format, dtype=x.dtype)


def _bounds(config):
    qmin, qmax = (int(q) for q in config.bounds)
    return qmin, qmax


def _is_of_rows(x, config):
    """Whether the config asks for int8 codes with one float32 scale per row."""
    if not isinstance(x, jax.Array) or x.dtype not in _FLOATS or is_sharded(x) or not x.size:
        return False
    is_plain = (config.format, config.range, config.symmetric) == (INT8, AbsMax(), True)
    has_float32 = config.stored_scale_dtype == "float32"
    per_row = (*(1,) * (x.ndim - 1), x.shape[-1])
    return is_plain and has_float32 and block_shape(x.shape, config) == per_row


def _pays_on_tpu(x):
    least = _LEAST_ROWS.get(chips.generation(), math.inf)
    return math.prod(x.shape[:-1]) >= least and x.shape[-1] <= _LONGEST_ROW


def _pays_on_cpu():
    # 2 cores, AVX512, float32, microseconds against those of XLA: 15 and 20 for 1 x 4096, 13 and 22
    # for 8 x 384, 1000 and 3200 for 512 x 4096; equal for 1 x 32 and 64 x 4096.
    return native.unavailable() is None
