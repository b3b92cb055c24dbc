"""A Pallas kernel for TPUs: attention of a few tokens over a cache of keys and values.

It is compiled for v5e and v6e and checked in interpret mode; it has not run on a TPU yet.
"""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import pallas_tpu
from .lazy import LazyModule

if TYPE_CHECKING:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu
else:
    pl = LazyModule("jax.experimental.pallas")
    pltpu = LazyModule("jax.experimental.pallas.tpu")

# Positions of one step: a step costs a third of a microsecond, in which v5e reads 270 kB.
_POSITIONS = 4096
# Rows of a tile of float32.
_SCALE_ROWS = 8
# Positions whose scales fit into VMEM.
MOST_POSITIONS = 2**17
# Rows of a tile of bfloat16.
_TILE_ROWS = 16
_LEAST = float(np.finfo(np.float32).min)


def attend(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    dtype: jax.typing.DTypeLike,
    key_scale: jax.Array | None,
    value_scale: jax.Array | None,
    starts: jax.Array,
    layer: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attention of T tokens over the cache of one layer, block by block.

    Keys and values behind the last token are not read, nor are other layers. The largest score and
    the sum of each row are carried from block to block (FlashAttention).

    Args:
        query: float32 (B, T, N, D), with the factor of the scores.
        keys, values: (L, B, H, S, D) as `kv.Cache` stores them, of at least 8 bits.
        dtype: of their numbers: int8 or a float.
        key_scale, value_scale: (B, H, S) floats, of that layer; None for 1.
        starts: (B,): token t sees the positions up to starts + t.
        layer: scalar, which of the L layers.
        interpret: runs without a TPU, slowly, for tests.

    Returns:
        (B, T, N, D) float32.

    Error: query, keys, values and the weights of the sum are rounded to bfloat16, as XLA does in
        its default precision on TPUs; int8 codes are exact in it. Sums are in float32.
    Source: Dao et al. 2022, arXiv:2205.14135, algorithm 1.
    """
    (batch, tokens, heads, size), (_, _, shared, capacity, _) = query.shape, keys.shape
    group = heads // shared
    # Token by token, the query heads that share a key head.
    rows = query.reshape(batch, tokens, shared, group, size).transpose(0, 2, 1, 3, 4)
    rows = rows.reshape(batch, shared, tokens * group, size).astype(jnp.bfloat16)
    padding = -rows.shape[2] % _TILE_ROWS
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, padding), (0, 0)))
    block = min(_POSITIONS, capacity)
    steps = pl.cdiv(capacity, block)

    def own(b: Any, h: Any, s: Any, *_: Any) -> Any:
        return b, h, 0, 0

    def last(b: Any, starts: Any) -> Any:
        return jnp.minimum(lax.div(starts[b] + tokens - 1, block), steps - 1)

    def of_cache(b: Any, h: Any, s: Any, layer: Any, starts: Any) -> Any:
        return layer[0], b, h, jnp.minimum(s, last(b, starts)), 0

    def of_scales(b: Any, h: Any, *_: Any) -> Any:
        return lax.div(b * shared + h, _SCALE_ROWS), 0

    tile = pl.BlockSpec((1, 1, rows.shape[2], size), own)
    per_position = pl.BlockSpec((1, 1, 1, block, size), of_cache)
    scales = [x.reshape(-1, capacity) for x in (key_scale, value_scale) if x is not None]
    # Read once for so many heads: XLA stores them in one tile.
    per_scale = pl.BlockSpec((min(batch * shared, _SCALE_ROWS), steps * block), of_scales)
    column = pltpu.VMEM((rows.shape[2], 1), jnp.float32)
    kernel = functools.partial(
        _attend_block,
        dtype=jnp.dtype(dtype),
        tokens=tokens,
        group=group,
        capacity=capacity,
        has_scales=(key_scale is not None, value_scale is not None),
    )
    if size % 128 == 0:  # XLA would copy shorter heads into another layout.
        keys, values = (pallas_tpu.in_hbm(x, interpret) for x in (keys, values))
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, shared, steps),
            in_specs=[tile, per_position, per_position, *[per_scale] * len(scales)],
            out_specs=tile,
            scratch_shapes=[column, column, pltpu.VMEM(rows.shape[2:], jnp.float32)],
        ),
        out_shape=pallas_tpu.result_type(rows.shape, jnp.float32, keys),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=pallas_tpu.VMEM_LIMIT,
        ),
        cost_estimate=_cost(rows, keys, scales),
        interpret=interpret,
        name="attend",
    )(layer.reshape(1), starts, rows, keys, values, *scales)
    out = out[:, :, : tokens * group].reshape(batch, shared, tokens, group, size)
    return out.transpose(0, 2, 1, 3, 4).reshape(query.shape)


def _attend_block(
    layer: Any,
    starts: Any,
    query: Any,
    keys: Any,
    values: Any,
    *refs: Any,
    dtype: np.dtype,
    tokens: int,
    group: int,
    capacity: int,
    has_scales: tuple[bool, bool],
) -> None:
    """Adds the positions of one block to what the rows have seen of those before it."""
    *scales, out, largest, total, summed = refs
    b, h, s = (pl.program_id(axis) for axis in range(3))
    block = keys.shape[3]
    row = lax.rem(b * pl.num_programs(1) + h, _SCALE_ROWS)
    here = pl.ds(row, 1), pl.ds(pl.multiple_of(s * block, block), block)
    key_scale, value_scale = (
        scales.pop(0)[here].astype(jnp.float32) if has else None for has in has_scales
    )

    @pl.when(s == 0)
    def _() -> None:
        largest[...] = jnp.full_like(largest, _LEAST)
        total[...] = jnp.zeros_like(total)
        summed[...] = jnp.zeros_like(summed)

    @pl.when(s * block < starts[b] + tokens)
    def _() -> None:
        scores = _dot(query[0, 0], _numbers(keys[0, 0, 0], dtype), (1, 1))
        scores = scores if key_scale is None else scores * key_scale
        position = s * block + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        token = lax.div(lax.broadcasted_iota(jnp.int32, scores.shape, 0), group)
        # Padded rows see what the last token does.
        is_seen = position <= starts[b] + jnp.minimum(token, tokens - 1)
        scores = jnp.where(is_seen, scores, _LEAST)
        peak = jnp.maximum(largest[...], jnp.max(scores, 1, keepdims=True))
        weights, earlier = jnp.exp(scores - peak), jnp.exp(largest[...] - peak)
        largest[...] = peak
        total[...] = earlier * total[...] + jnp.sum(weights, 1, keepdims=True)
        weights = weights if value_scale is None else weights * value_scale
        # Beyond the capacity, scales and values are arbitrary, perhaps NaN.
        weights = jnp.where(is_seen, weights, 0).astype(jnp.bfloat16)
        numbers = _numbers(values[0, 0, 0], dtype)
        if capacity % block:
            places = s * block + lax.broadcasted_iota(jnp.int32, numbers.shape, 0)
            numbers = jnp.where(places < capacity, numbers, 0)
        summed[...] = earlier * summed[...] + _dot(weights, numbers, (1, 0))

    @pl.when(s == pl.num_programs(2) - 1)
    def _() -> None:
        out[0, 0] = summed[...] / total[...]


def _numbers(stored: jax.Array, dtype: np.dtype) -> jax.Array:
    """Codes or floats in bfloat16, from how the cache stores them."""
    if stored.dtype != dtype:
        stored = lax.bitcast_convert_type(stored, dtype)
    # Mosaic does not convert int8 to bfloat16 directly.
    return stored.astype(jnp.float32).astype(jnp.bfloat16)


def _dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    numbers = ((axes[0],), (axes[1],)), ((), ())
    return lax.dot_general(x, y, numbers, preferred_element_type=jnp.float32)


def _cost(rows: jax.Array, keys: jax.Array, scales: list[jax.Array]) -> "pl.CostEstimate":
    """That of a full cache: keys and values of one layer are read once."""
    moved = 2 * keys.nbytes // keys.shape[0] + sum(x.nbytes for x in scales)
    batch, shared, count, size = rows.shape
    scores = batch * shared * count * keys.shape[3]
    return pl.CostEstimate(
        flops=4 * scores * size,
        transcendentals=scores,
        bytes_accessed=moved + rows.size * 6,
    )
