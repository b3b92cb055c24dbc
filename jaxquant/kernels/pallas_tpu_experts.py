"""A Pallas kernel for TPUs: rows times matrices of a quantized stack, such as experts.

It is compiled for v5e and v6e and checked in interpret mode; it has not run on a TPU yet.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import pallas_tpu
from .lazy import LazyModule

if TYPE_CHECKING:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu
else:
    pl = LazyModule("jax.experimental.pallas")
    pltpu = LazyModule("jax.experimental.pallas.tpu")

# Up to so many rows are one tile, so that each expert is read once.
_ONE_TILE = 256
# Rows up to which one tile is quantized in the first step, and their bytes.
_MOST_QUANTIZED, _MOST_BYTES = 64, 4 * 2**20
# Tiles of more rows have twice as many as an expert has on average, between these.
_LEAST_ROWS, _MOST_ROWS = 128, 512


class RowCodes(NamedTuple):
    """Codes to which a kernel quantizes rows: their dtype, and the largest of them."""

    dtype: Any
    largest: float


def ragged_dot(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    row_scale: jax.Array | None,
    sizes: jax.Array,
    *,
    most: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """row_scale * (x[i] @ ((w[e] - zero[e]) * scale[e])), with e the expert of row i.

    A step multiplies a tile of rows by a tile of one expert that has rows in it; experts without
    rows are not read. Rows of other experts in the tile are multiplied, too, and dropped.

    Args:
        x: floats, which are rounded to bfloat16, or int8, (M, K) with M > 0: the rows of the first
            expert, then those of the second, and so on.
        w: 4- or 8-bit integers, or 8-bit floats, (E, K, N).
        scale, zero: (E, groups, N), in groups that `pallas_tpu.why_unsupported_groups` accepts; a
            zero of None means 0. If they have fewer matrices, such as those of one layer, the next
            ones have the same again.
        row_scale: (M, 1); None means 1.
        sizes: (E,) integers, the rows of each expert. Rows beyond their sum give zeros.
        most: how many of the experts may have rows; None for all of them.
        dtype: of the result, float32 or bfloat16.
        interpret: runs without a TPU, slowly, for tests.

    Error: as for `pallas_tpu.grouped_dot`. int8 by int8 with one scale per column is summed in
        int32 within a tile.
    """
    (rows, length), (experts, _, columns) = x.shape, w.shape
    size, most = length // scale.shape[1], experts if most is None else most
    tile = _tile(rows, length, columns, most, size)
    found = steps(sizes, rows, tile.rows, most)
    out = _by_steps(x, w, scale, zero, row_scale, found, tile, dtype, interpret)
    return jnp.where(jnp.arange(rows)[:, None] < jnp.sum(sizes), out, 0)


def stacked_dot(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    row_scale: jax.Array | None,
    layer: jax.Array,
    *,
    row_codes: RowCodes | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """row_scale * (x @ ((w[layer] - zero[layer]) * scale[layer])), of which no other is read.

    Args:
        x, w, scale, zero, row_scale, dtype, interpret: as for `ragged_dot`.
        layer: scalar, from 0 to E - 1.
        row_codes: what `pallas_tpu.quantize_rows` makes of the rows of x, floats that
            `quantizes_in_place` accepts, before they are multiplied; row_scale is None then. None
            for rows that are multiplied as they are.

    Error: as for `ragged_dot`.
    """
    (rows, length), columns = x.shape, w.shape[2]
    tile = _tile(rows, length, columns, 1, length // scale.shape[1])
    count = math.ceil(rows / tile.rows)
    # All rows are those of one matrix.
    place = jnp.arange(count, dtype=jnp.int32)
    layers = jnp.broadcast_to(layer.astype(jnp.int32), place.shape)
    found = layers, place, jnp.zeros(1, jnp.int32), jnp.full(1, count, jnp.int32)
    return _by_steps(x, w, scale, zero, row_scale, found, tile, dtype, interpret, row_codes)


def quantizes_in_place(x: jax.Array) -> bool:
    """Whether `stacked_dot` quantizes the rows of x: a few that fit into VMEM."""
    return x.shape[0] <= _MOST_QUANTIZED and x.size * x.dtype.itemsize <= _MOST_BYTES


def _by_steps(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    row_scale: jax.Array | None,
    steps: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    tile: "_Tile",
    dtype: jax.typing.DTypeLike,
    interpret: bool,
    row_codes: RowCodes | None = None,
) -> jax.Array:
    """What each of the `steps` adds."""
    (rows, length), columns, size = x.shape, w.shape[2], x.shape[1] // scale.shape[1]
    itemsize = jnp.dtype(dtype).itemsize
    along = length // tile.length
    grid = (pl.cdiv(columns, tile.columns), steps[0].shape[0], along)
    specs = _specs(tile, scale.shape[:2], w.shape[0], along - 1)
    scales = [scale, zero]
    if len(scale) == len(w):  # Stacks of all layers, of which XLA would copy parts into VMEM.
        scales = [None if v is None else pallas_tpu.in_hbm(v, interpret) for v in scales]
    given = zip((row_scale, *scales), (specs.per_row, *[specs.per_column] * 2), strict=True)
    parameters = [(v.astype(jnp.float32), spec) for v, spec in given if v is not None]
    kernel = pallas_tpu.scale_sums if 2 * tile.rows <= size else pallas_tpu.scale_weights
    multiply: Callable[..., jax.Array] = functools.partial(_by_pieces, kernel=kernel, size=size)
    multiplied = x.dtype if row_codes is None else row_codes.dtype
    if multiplied == w.dtype == jnp.int8 and size == length and zero is None:
        multiply = _by_codes
    if row_codes is None:
        x = x if x.dtype == jnp.int8 else x.astype(jnp.bfloat16)
        run = functools.partial(_accumulate, has_rows=row_scale is not None)
        of_rows, of_codes, moved = specs.rows, [], grid[0] * x.nbytes
    else:
        run = functools.partial(_quantize_first, largest=row_codes.largest)
        of_rows, moved = pl.BlockSpec(x.shape, lambda *_: (0, 0)), x.nbytes
        of_codes = [pltpu.VMEM(x.shape, multiplied), pltpu.VMEM((rows, 1), jnp.float32)]
    # Codes of rows stay from the first step to the last.
    of_columns = "parallel" if row_codes is None else "arbitrary"
    return pl.pallas_call(
        functools.partial(run, multiply=multiply),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=grid,
            in_specs=[of_rows, specs.weights, *[spec for _, spec in parameters]],
            out_specs=specs.out,
            scratch_shapes=[*of_codes, pltpu.VMEM((tile.rows, tile.columns), jnp.float32)],
        ),
        out_shape=pallas_tpu.result_type((rows, columns), dtype, x),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(of_columns, "arbitrary", "arbitrary"),
            vmem_limit_bytes=pallas_tpu.VMEM_LIMIT,
        ),
        cost_estimate=_cost(
            grid, tile.rows, w, scale, 1 + (zero is not None), moved + rows * columns * itemsize
        ),
        interpret=interpret,
        name="ragged_dot",
    )(*steps, x, pallas_tpu.in_hbm(w, interpret), *[v for v, _ in parameters])


class _Tile(NamedTuple):
    """Elements along each axis that one step multiplies."""

    rows: int
    length: int
    columns: int


def _tile(rows: int, length: int, columns: int, experts: int, size: int) -> _Tile:
    tile_rows = _row_tile(rows, experts)
    tile_length = pallas_tpu.tile_length(length, size, tile_rows)
    assert tile_length is not None, (length, size)
    return _Tile(tile_rows, tile_length, pallas_tpu.column_tile(columns))


class _Specs(NamedTuple):
    """Which tiles of each array a step (j, i, k) reads or writes."""

    rows: Any
    weights: Any
    per_row: Any
    per_column: Any
    out: Any


def _specs(tile: _Tile, scales: tuple[int, ...], experts: int, last: int) -> _Specs:
    """Steps without work keep the tiles of the step before, the `last` along K.

    `scales`: (matrices, groups) of scales, for so many experts.
    """
    matrices, groups = scales

    def along(i: Any, k: Any, count: Any) -> Any:
        return jnp.where(i < count[0], k, last)

    def of_rows(j: Any, i: Any, k: Any, expert: Any, place: Any, starts: Any, count: Any) -> Any:
        return place[i], along(i, k, count)

    def of_weights(j: Any, i: Any, k: Any, expert: Any, place: Any, starts: Any, count: Any) -> Any:
        return expert[i], along(i, k, count), j

    def per_column(j: Any, i: Any, k: Any, expert: Any, *_: Any) -> Any:
        own = expert[i] if matrices == experts else lax.rem(expert[i], matrices)
        return (0 if matrices == 1 else own), 0, j

    return _Specs(
        rows=pl.BlockSpec((tile.rows, tile.length), of_rows),
        weights=pl.BlockSpec((None, tile.length, tile.columns), of_weights),
        per_row=pl.BlockSpec((tile.rows, 1), lambda j, i, k, expert, place, *_: (place[i], 0)),
        per_column=pl.BlockSpec((None, groups, tile.columns), per_column),
        out=pl.BlockSpec(
            (tile.rows, tile.columns), lambda j, i, k, expert, place, *_: (place[i], j)
        ),
    )


def _row_tile(rows: int, experts: int) -> int:
    if rows <= _ONE_TILE:
        return rows
    wanted = max(_LEAST_ROWS, 2 * rows // experts)
    return pallas_tpu.even_tile(rows, min(wanted, _MOST_ROWS), 32)


def steps(
    sizes: jax.Array, rows: int, tile: int, experts: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Expert and tile of rows of each step, where experts start, and how many steps have work.

    Steps are in the order of rows, so that those of one tile follow each other. There is one for
    each tile, and one more wherever another of the `experts` that have rows begins within a tile.
    """
    sizes = jnp.maximum(sizes.astype(jnp.int32), 0)
    ends = jnp.minimum(jnp.cumsum(sizes), rows)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    first, final = starts // tile, (ends - 1) // tile
    counts = jnp.where(ends > starts, final - first + 1, 0)
    until = jnp.cumsum(counts)
    most = math.ceil(rows / tile) + min(experts, rows) - 1
    step = jnp.minimum(jnp.arange(most), jnp.maximum(until[-1] - 1, 0))
    expert = jnp.minimum(jnp.searchsorted(until, step, side="right"), sizes.shape[0] - 1)
    expert = expert.astype(jnp.int32)
    place = jnp.clip(first[expert] + step - (until - counts)[expert], 0).astype(jnp.int32)
    return expert, place, starts, until[-1:]


def _quantize_first(*refs: Any, multiply: Callable[..., jax.Array], largest: float) -> None:
    """`_accumulate` of rows whose codes and scales the first step leaves for the others."""
    numbers, (x_ref, w_ref), rest = refs[:4], refs[4:6], refs[6:]
    *rest, codes_ref, row_scale_ref, sum_ref = rest
    k, length = pl.program_id(2), w_ref.shape[0]

    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0) & (k == 0))
    def _() -> None:
        pallas_tpu.quantize_tile(x_ref, codes_ref, row_scale_ref, qmin=-largest, qmax=largest)

    part = codes_ref.at[:, pl.ds(pl.multiple_of(k * length, length), length)]
    refs = (*numbers, part, w_ref, row_scale_ref, *rest, sum_ref)
    _accumulate(*refs, multiply=multiply, has_rows=True)


def _accumulate(
    expert_ref: Any,
    place_ref: Any,
    starts_ref: Any,
    count_ref: Any,
    x_ref: Any,
    w_ref: Any,
    *refs: Any,
    multiply: Callable[..., jax.Array],
    has_rows: bool,
) -> None:
    """Adds the product of two tiles; after the last along K, writes the rows from its expert on."""
    row_scale, refs = (refs[0], refs[1:]) if has_rows else (None, refs)
    *parameters, out_ref, sum_ref = refs
    i, k, last = pl.program_id(1), pl.program_id(2), pl.num_programs(2) - 1
    works = i < count_ref[0]

    @pl.when(works & (k == 0))
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(works)
    def _() -> None:
        sum_ref[...] += multiply(x_ref, w_ref, parameters, k)

    @pl.when(works & (k == last))
    def _() -> None:
        total = sum_ref[...] if row_scale is None else sum_ref[...] * row_scale[...]
        rows = place_ref[i] * total.shape[0] + lax.broadcasted_iota(jnp.int32, total.shape, 0)
        # Those before have another expert; those of later ones are written again by their steps.
        is_new = rows >= starts_ref[jnp.minimum(expert_ref[i], starts_ref.shape[0] - 1)]
        out_ref[...] = jnp.where(is_new, total.astype(out_ref.dtype), out_ref[...])


def _by_pieces(
    x_ref: Any,
    w_ref: Any,
    parameters: Sequence[Any],
    k: Any,
    *,
    kernel: Callable[..., jax.Array],
    size: int,
) -> jax.Array:
    """The product of two tiles in bfloat16, by one of the kernels of `pallas_tpu`."""
    return kernel(x_ref, pallas_tpu.pieces(w_ref, parameters, k, size))


def _by_codes(x_ref: Any, w_ref: Any, parameters: Sequence[Any], k: Any) -> jax.Array:
    """The product of two tiles of int8, summed in int32, by one scale per column."""
    (scale,) = parameters
    sums = jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * scale[...]


def _cost(
    grid: tuple[int, ...],
    tile_rows: int,
    w: jax.Array,
    scale: jax.Array,
    parameters: int,
    moved: int,
) -> "pl.CostEstimate":
    """Memory traffic: w and its scales once per step, and `moved` bytes of rows and result."""
    steps, (_, length, columns) = grid[1], w.shape
    info = jnp.iinfo if jnp.issubdtype(w.dtype, jnp.integer) else jnp.finfo
    bits = info(w.dtype).bits
    per_step = length * columns * bits // 8 + parameters * 4 * scale.size // len(scale)
    return pl.CostEstimate(
        flops=2 * steps * tile_rows * length * columns,
        transcendentals=0,
        bytes_accessed=steps * per_step + moved,
    )
