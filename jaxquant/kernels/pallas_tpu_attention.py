"""A Pallas kernel for TPUs: attention over a cache of keys and values.

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

# Positions of one step: a step costs a third of a microsecond, in which v5e reads 270 kB. Scores of
# many rows fit into VMEM with fewer positions.
_POSITIONS, _POSITIONS_OF_MANY_ROWS = 4096, 1024
# Rows of one step, which are tokens and query heads of a key head; more than so many are many.
_ROWS, _FEW_ROWS = 512, 64
# Positions whose scales fit into VMEM.
MOST_POSITIONS = 2**17
# Lengths of sequences of all layers that fit into the memory of the TPU's scalars.
MOST_LENGTHS = 4096
# Elements of a result that is held in VMEM.
_MOST_JOINED = 2**20
_LEAST = float(np.finfo(np.float32).min)


def attend(
    query: jax.Array,
    stored: tuple[jax.Array, jax.Array],
    scales: tuple[jax.Array, ...],
    dtype: jax.typing.DTypeLike,
    lengths: jax.Array,
    counts: jax.Array | None,
    layer: jax.Array,
    *,
    dtype_of_result: jax.typing.DTypeLike = jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """Attention of T tokens over the cache of one layer, block by block.

    Keys and values behind the last token are not read, nor are other layers. The largest score and
    the sum of each row are carried from block to block (FlashAttention).

    Args:
        query: float32 (B, T, N, D), with the factor of the scores.
        stored: keys and values, (L, B, H, S, D) as `kv.Cache` stores them, of at least 8 bits.
        scales: those of keys and of values, floats (L, B, H, S), or (1, B, H, S) of that layer; ()
            for 1.
        dtype: of the numbers of keys and values: int8 or a float.
        lengths: (L, B), or (1, B) of that layer: tokens of each sequence, those of the query
            included.
        counts: (B,): how many of the T tokens these are, the first ones; None for all.
        layer: scalar, which of the L layers; -1 is the last one.
        dtype_of_result: float32 or bfloat16.
        interpret: runs without a TPU, slowly, for tests.

    Returns:
        (B, T, N, D); NaN for sequences of more than S tokens.

    Error: query, keys, values and the weights of the sum are rounded to bfloat16, as XLA does in
        its default precision on TPUs; int8 codes are exact in it. Sums are in float32.
    Source: Dao et al. 2022, arXiv:2205.14135, algorithm 1.
    """
    (batch, tokens, heads, size), (keys, values) = query.shape, stored
    rows = _by_key_head(query, keys.shape[2]).astype(jnp.bfloat16)
    if size % 128 == 0:  # XLA would copy shorter heads into another layout.
        keys, values = (pallas_tpu.in_hbm(x, interpret) for x in (keys, values))
    scales = tuple(pallas_tpu.in_hbm(x, interpret) if len(x) > 1 else x for x in scales)
    numbers = [layer.reshape(1), lengths, *([] if counts is None else [counts])]
    grid, tile, of_arrays = _blocks(rows, (keys, values, *scales), tokens, counts is not None)
    tile_rows = tile.block_shape[2]
    column = pltpu.VMEM((tile_rows, 1), jnp.float32)
    # The next product wants rows of all heads.
    is_joined = size % 128 == 0 and grid[2] == 1 and query.size <= _MOST_JOINED
    semantics = "arbitrary" if is_joined else "parallel"
    result, held = rows.shape, []
    if is_joined:
        result = batch * tokens, heads * size
        held = [pltpu.VMEM((heads, batch * tokens, size), jnp.float32)]
    kernel = functools.partial(
        _attend_block,
        dtype=jnp.dtype(dtype),
        tokens=tokens,
        group=heads // keys.shape[2],
        capacity=keys.shape[3],
        has_counts=counts is not None,
        is_joined=is_joined,
    )
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(numbers),
            grid=grid,
            in_specs=[tile, *of_arrays],
            out_specs=pl.BlockSpec(result, lambda *_: (0, 0)) if is_joined else tile,
            scratch_shapes=[*held, column, column, pltpu.VMEM((tile_rows, size), jnp.float32)],
        ),
        out_shape=pallas_tpu.result_type(result, dtype_of_result, keys),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(semantics, semantics, semantics, "arbitrary"),
            vmem_limit_bytes=pallas_tpu.VMEM_LIMIT,
        ),
        cost_estimate=_cost(rows, tile_rows, keys, scales),
        interpret=interpret,
        name="attend",
    )(*numbers, rows, keys, values, *scales)
    if not is_joined:
        out = out.reshape(batch, keys.shape[2], tokens, -1, size).transpose(0, 2, 1, 3, 4)
    return out.reshape(query.shape)


def _by_key_head(query: jax.Array, heads: int) -> jax.Array:
    """(B, T, N, D) as (B, H, T * N / H, D): token by token, the queries that share a key head."""
    batch, tokens, _, size = query.shape
    rows = query.reshape(batch, tokens, heads, -1, size).transpose(0, 2, 1, 3, 4)
    return rows.reshape(batch, heads, -1, size)


def _blocks(
    rows: jax.Array, arrays: tuple[jax.Array, ...], tokens: int, has_counts: bool
) -> tuple[tuple[int, ...], Any, list[Any]]:
    """The grid, the block of the rows of a key head, and those of keys, values and scales."""
    _, batch, shared, capacity, size = arrays[0].shape
    count = rows.shape[2]
    tile, group = min(_ROWS, count), count // tokens
    block = min(_POSITIONS if count <= _FEW_ROWS else _POSITIONS_OF_MANY_ROWS, capacity)
    steps = pl.cdiv(capacity, block)

    def own(b: Any, h: Any, r: Any, *_: Any) -> Any:
        return b, h, r, 0

    def of_cache(b: Any, h: Any, r: Any, s: Any, layer: Any, lengths: Any, *counts: Any) -> Any:
        start = _length(lengths, layer, b) - (counts[0][b] if has_counts else tokens)
        seen = start + _last_token(r, tile, group, tokens)
        last = jnp.clip(lax.div(seen, block), 0, steps - 1)
        return _own(layer, len(arrays[0])), b, h, jnp.minimum(s, last), 0

    def of_scales(b: Any, h: Any, r: Any, s: Any, layer: Any, *_: Any) -> Any:
        return _own(layer, len(arrays[2])), b, 0, 0

    per_position = pl.BlockSpec((1, 1, 1, block, size), of_cache)
    # Read once for all heads, which XLA stores in one tile.
    per_scale = pl.BlockSpec((1, 1, shared, steps * block), of_scales)
    grid = batch, shared, pl.cdiv(count, tile), steps
    specs = [per_position, per_position, *[per_scale] * len(arrays[2:])]
    return grid, pl.BlockSpec((1, 1, tile, size), own), specs


def _own(layer: Any, layers: int) -> Any:
    """The place of the layer among so many."""
    # Scalars take long to divide.
    return 0 if layers == 1 else jnp.where(layer[0] < 0, layer[0] + layers, layer[0])


def _length(lengths: Any, layer: Any, b: Any) -> Any:
    """Tokens of a sequence."""
    return lengths[_own(layer, lengths.shape[0]), b]


def _last_token(r: Any, tile: int, group: int, tokens: int) -> Any:
    """That of a tile of rows."""
    return jnp.minimum(lax.div((r + 1) * tile - 1, group), tokens - 1)


def _attend_block(
    layer: Any,
    lengths: Any,
    *refs: Any,
    dtype: np.dtype,
    tokens: int,
    group: int,
    capacity: int,
    has_counts: bool,
    is_joined: bool,
) -> None:
    """Adds the positions of one block to what the rows have seen of those before it."""
    counts, refs = (refs[0], refs[1:]) if has_counts else (None, refs)
    *given, largest, total, summed = refs
    query, keys, values, *scales, out = given[: len(given) - is_joined]
    b, h, r, s = (pl.program_id(axis) for axis in range(4))
    is_last = [pl.program_id(axis) == pl.num_programs(axis) - 1 for axis in range(4)]
    length = _length(lengths, layer, b)
    start = length - (tokens if counts is None else counts[b])
    tile, block = query.shape[2], keys.shape[3]
    here = 0, 0, pl.ds(h, 1), pl.ds(pl.multiple_of(s * block, block), block)
    factors = [x[here].astype(jnp.float32) for x in scales]

    @pl.when(s == 0)
    def _() -> None:
        largest[...] = jnp.full_like(largest, _LEAST)
        total[...] = jnp.zeros_like(total)
        summed[...] = jnp.zeros_like(summed)

    @pl.when(s * block <= start + _last_token(r, tile, group, tokens))
    def _() -> None:
        scores = _dot(query[0, 0], _numbers(keys[0, 0, 0], dtype), (1, 1))
        scores = scores * factors[0] if factors else scores
        position = s * block + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        token = lax.div(r * tile + lax.broadcasted_iota(jnp.int32, scores.shape, 0), group)
        is_seen = position <= start + token
        scores = jnp.where(is_seen, scores, _LEAST)
        peak = jnp.maximum(largest[...], jnp.max(scores, 1, keepdims=True))
        weights, earlier = jnp.exp(scores - peak), jnp.exp(largest[...] - peak)
        largest[...] = peak
        total[...] = earlier * total[...] + jnp.sum(weights, 1, keepdims=True)
        weights = weights * factors[1] if factors else weights
        # Beyond the capacity, scales and values are arbitrary, perhaps NaN.
        weights = jnp.where(is_seen, weights, 0).astype(jnp.bfloat16)
        numbers = _numbers(values[0, 0, 0], dtype)
        if capacity % block:
            places = s * block + lax.broadcasted_iota(jnp.int32, numbers.shape, 0)
            numbers = jnp.where(places < capacity, numbers, 0)
        summed[...] = earlier * summed[...] + _dot(weights, numbers, (1, 0))

    @pl.when(is_last[3])
    def _() -> None:
        found = jnp.where(length > capacity, jnp.nan, summed[...] / total[...])
        if is_joined:
            first = b * tokens, h * group
            _join(out, given[-1], found, first, group, is_last[0] & is_last[1])
        else:
            out[0, 0] = found.astype(out.dtype)


def _join(
    out: Any, held: Any, found: jax.Array, first: tuple[Any, Any], group: int, is_last: Any
) -> None:
    """Puts the rows of a key head beside each other, and all into the result after the last.

    Args:
        out: (B * T, N * D).
        held: the same as (N, B * T, D), in 32 bits.
        found: rows of tokens and, within these, heads, (T * group, D).
        first: of all tokens and heads, the first ones of `found`.
        group: heads of each token in `found`.
        is_last: whether nothing is left to be found.
    """
    rows, size = found.shape
    place = lax.broadcasted_iota(jnp.int32, held.shape[1:], 0)
    for row in range(rows):
        token, head = first[0] + row // group, first[1] + row % group
        # A single row of several tiles cannot be written at a place that is not known.
        held[head] = jnp.where(place == token, found[row : row + 1], held[head])

    @pl.when(is_last)
    def _() -> None:
        for head in range(held.shape[0]):
            out[:, head * size : (head + 1) * size] = held[head].astype(out.dtype)


def _numbers(stored: jax.Array, dtype: np.dtype) -> jax.Array:
    """Codes or floats in bfloat16, from how the cache stores them."""
    if stored.dtype != dtype:
        stored = lax.bitcast_convert_type(stored, dtype)
    # Mosaic does not convert int8 to bfloat16 directly.
    return stored.astype(jnp.float32).astype(jnp.bfloat16)


def _dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    numbers = ((axes[0],), (axes[1],)), ((), ())
    return lax.dot_general(x, y, numbers, preferred_element_type=jnp.float32)


def _cost(
    rows: jax.Array, tile: int, keys: jax.Array, scales: tuple[jax.Array, ...]
) -> "pl.CostEstimate":
    """That of a full cache: keys and values of one layer are read once per tile of rows."""
    batch, shared, count, size = rows.shape
    moved = sum(x.nbytes // x.shape[0] for x in (keys, keys, *scales))
    scores = batch * shared * count * keys.shape[3]
    return pl.CostEstimate(
        flops=4 * scores * size,
        transcendentals=scores,
        bytes_accessed=pl.cdiv(count, tile) * moved + rows.size * 6,
    )
