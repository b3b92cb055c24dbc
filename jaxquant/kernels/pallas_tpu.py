"""Pallas kernels for TPUs, where XLA would write intermediate results to memory and read them back.

They are compiled for v5e and v6e and checked in interpret mode; they have not run on a TPU yet.
The times below are numbers of instruction bundles that the compiler scheduled, divided by the
clock rate, as printed by `benchmarks/pallas_tpu.py`.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from .lazy import LazyModule

if TYPE_CHECKING:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu
else:  # They take twice as long to import as this package, and only programs for TPUs need them.
    pl = LazyModule("jax.experimental.pallas")
    pltpu = LazyModule("jax.experimental.pallas.tpu")

# Tiles of x (rows, K) and of w (K, N). They are large, because a grid step costs a third of a
# microsecond, and take at most 24 MiB of VMEM when double-buffered.
_ROWS = 512
_COLUMNS = 1024
_LENGTH = 2048
_LENGTH_OF_MANY_ROWS = 1024
# Rows from which a tile of x is large.
_MANY_ROWS = 256
# The default float32 precision of XLA on TPUs: one pass of bfloat16.
ONE_PASS = (None, lax.Precision.DEFAULT, "default", "fastest", "bfloat16")
VMEM_LIMIT = 48 * 2**20
# Smaller groups do not fill a tile of 4-bit codes.
_LEAST_GROUP = 32
# Their scales and zero points for a tile of columns take 16 MiB when double-buffered.
_MOST_GROUPS = 1024
# The loop over them is unrolled: with 172, compilation took 40 seconds.
_MOST_GROUPS_OF_TILE = 64
# Bytes of a tile of rows that `quantize_rows` reads.
_ROW_BYTES = 2 * 2**20

# (slice of K, codes minus zero point, row of scales) of one group.
Piece = tuple[slice, jax.Array, jax.Array]


def why_unsupported_groups(length: int, groups: int) -> str | None:
    """Why `grouped_dot` does not support this many groups along `length`, or None."""
    size = length // max(groups, 1)
    if groups > 1 and size % _LEAST_GROUP:
        return f"groups of {size} are not a multiple of {_LEAST_GROUP}"
    if groups > _MOST_GROUPS:
        return f"more than {_MOST_GROUPS} groups along a length of {length}"
    if None in (tile_length(length, size, n) for n in (1, _MANY_ROWS + 1)):
        return f"no tile divides a length of {length} with groups of {size}"
    return None


def grouped_dot(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    row_scale: jax.Array | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """row_scale * (x @ ((w - zero) * scale)), reading 4-bit weights and widening them in VMEM.

    If there are at most half as many rows as elements per group, the sum of each group is scaled.
    Otherwise the weights are scaled, at a cost that does not depend on the rows (v6e, 4096 x 4096,
    groups of 128: scaling sums takes 4, 7 and 21 microseconds for 8, 64 and 256 rows, scaling
    weights 10, 11 and 14).

    Args:
        x: floats, which are rounded to bfloat16, or int8, (M, K) with M > 0.
        w: 4-bit integers, (K, N).
        scale, zero: (groups, N), in groups that `why_unsupported_groups` accepts; a zero of None
            means 0.
        row_scale: (M, 1); None means 1.
        dtype: of the result, float32 or bfloat16.
        interpret: runs without a TPU, slowly, for tests.

    Error: codes minus zero points are exact in bfloat16 if those are integers or halves, and else
        rounded to it; sums are rounded as in float32. With many rows, the scaled weights
        are rounded to bfloat16, as XLA does.
    """
    (rows, length), columns, groups = x.shape, w.shape[1], scale.shape[0]
    size = length // groups
    tile_rows = even_tile(rows, _ROWS, 32)
    scales_sums = 2 * tile_rows <= size
    tile_k = tile_length(length, size, tile_rows)
    assert tile_k is not None, (length, groups)
    tile_columns = column_tile(columns)
    grid = (pl.cdiv(rows, tile_rows), pl.cdiv(columns, tile_columns), length // tile_k)
    per_row = pl.BlockSpec((tile_rows, 1), lambda i, j, k: (i, 0))
    per_column = pl.BlockSpec((groups, tile_columns), lambda i, j, k: (0, j))
    given = ((row_scale, per_row), (scale, per_column), (zero, per_column))
    parameters = [(v.astype(jnp.float32), spec) for v, spec in given if v is not None]
    kernel = scale_sums if scales_sums else scale_weights
    has_rows = row_scale is not None
    x = x if x.dtype == jnp.int8 else x.astype(jnp.bfloat16)
    return pl.pallas_call(
        functools.partial(_accumulate, kernel=kernel, size=size, has_rows=has_rows),
        grid=grid,
        in_specs=[
            pl.BlockSpec((tile_rows, tile_k), lambda i, j, k: (i, k)),
            pl.BlockSpec((tile_k, tile_columns), lambda i, j, k: (k, j)),
            *[spec for _, spec in parameters],
        ],
        out_specs=pl.BlockSpec((tile_rows, tile_columns), lambda i, j, k: (i, j)),
        out_shape=result_type((rows, columns), dtype, x),
        scratch_shapes=[pltpu.VMEM((tile_rows, tile_columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=_cost_of_dot(grid, x, w, scale, len(parameters) - has_rows, dtype),
        interpret=interpret,
        name="grouped_dot",
    )(x, w, *[v for v, _ in parameters])


def quantize_rows(
    x: jax.Array,
    qmin: float = -127,
    qmax: float = 127,
    dtype: jax.typing.DTypeLike = jnp.int8,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Quantizes each row by its largest magnitude, in one pass over memory.

        scale = max|x| / min(-qmin, qmax)        codes = clip(round(x / scale), qmin, qmax)

    Args:
        x: float32 or bfloat16, (M, K), not empty.
        qmin, qmax: smallest and largest code.
        dtype: of the codes: int8, or an 8-bit float, to which values are rounded when stored.
        interpret: runs without a TPU, slowly, for tests.

    Returns:
        codes, (M, K), and scale, float32 (M, 1). A row of zeros has scale 1, a row with NaN or
        Inf scale NaN; both have codes of 0.
    """
    rows, length = x.shape
    tile = max(32, _ROW_BYTES // (length * x.dtype.itemsize) // 32 * 32)
    tile = even_tile(rows, tile, 32)
    return pl.pallas_call(
        functools.partial(quantize_tile, qmin=qmin, qmax=qmax),
        grid=(pl.cdiv(rows, tile),),
        in_specs=[pl.BlockSpec((tile, length), lambda i: (i, 0))],
        out_specs=[
            pl.BlockSpec((tile, length), lambda i: (i, 0)),
            pl.BlockSpec((tile, 1), lambda i: (i, 0)),
        ],
        out_shape=[result_type(x.shape, dtype, x), result_type((rows, 1), jnp.float32, x)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * x.size,
            transcendentals=0,
            bytes_accessed=x.size * (x.dtype.itemsize + 1) + 4 * rows,
        ),
        interpret=interpret,
        name="quantize_rows",
    )(x)


def _accumulate(
    x_ref: Any, w_ref: Any, *refs: Any, kernel: Callable[..., jax.Array], size: int, has_rows: bool
) -> None:
    """Adds the product of two tiles to the sum of earlier tiles along K."""
    row_scale, refs = (refs[0], refs[1:]) if has_rows else (None, refs)
    *parameters, out_ref, sum_ref = refs
    k, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(k == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += kernel(x_ref, pieces(w_ref, parameters, k, size))

    @pl.when(k == last)
    def _() -> None:
        total = sum_ref[...] if row_scale is None else sum_ref[...] * row_scale[...]
        out_ref[...] = total.astype(out_ref.dtype)


def pieces(w_ref: Any, parameters: Sequence[Any], k: Any, size: int) -> Iterator[Piece]:
    """The pieces of a tile, one per group."""
    length = w_ref.shape[0]
    step = min(size, length)
    for start in range(0, length, step):
        # Neither is negative; `//` would query the TPU of this process.
        group = lax.div(k * length + start, size)
        scale, *zero = (ref[pl.ds(group, 1), :] for ref in parameters)
        codes = w_ref[start : start + step, :].astype(jnp.float32)
        yield slice(start, start + step), codes - zero[0] if zero else codes, scale


def scale_sums(x_ref: Any, pieces: Iterable[Piece]) -> jax.Array:
    """Scales the product of each group, a (rows, columns) array."""
    return functools.reduce(
        jnp.add, (_dot(x_ref[:, part], codes) * scale for part, codes, scale in pieces)
    )


def scale_weights(x_ref: Any, pieces: Iterable[Piece]) -> jax.Array:
    """Scales the weights and multiplies all groups of the tile at once."""
    weights = [(codes * scale).astype(jnp.bfloat16) for _, codes, scale in pieces]
    return _dot(x_ref[...], jnp.concatenate(weights))


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    # 8-bit codes are exact in bfloat16.
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return jnp.dot(x, w, preferred_element_type=jnp.float32)


def quantize_tile(x_ref: Any, codes_ref: Any, scale_ref: Any, *, qmin: float, qmax: float) -> None:
    """Writes what `quantize_rows` gives for whole rows."""
    x = x_ref[...].astype(jnp.float32)
    magnitude = jnp.abs(x)
    # Comparisons with NaN are false, so NaN becomes Inf as well, and the maximum keeps it.
    magnitude = jnp.where(magnitude < jnp.inf, magnitude, jnp.inf)
    peak = jnp.max(magnitude, 1, keepdims=True)
    # XLA divides by multiplying by the reciprocal, which must not be subnormal.
    scale = jnp.minimum(peak / min(-qmin, qmax), 1 / float(jnp.finfo(jnp.float32).tiny))
    scale = jnp.where(peak < jnp.inf, scale, jnp.nan)
    scale = jnp.where(scale == 0, 1, scale)
    codes = jnp.where(jnp.isnan(scale), 0, x / scale)
    is_integer = jnp.issubdtype(codes_ref.dtype, jnp.integer)
    codes = jnp.clip(jnp.round(codes) if is_integer else codes, qmin, qmax)
    codes_ref[...] = codes.astype(codes_ref.dtype)
    scale_ref[...] = scale


def even_tile(length: int, most: int, multiple: int) -> int:
    """The tile size, at most `most`, that pads `length` elements the least."""
    if length <= most:
        return length
    even = math.ceil(length / math.ceil(length / most))
    return math.ceil(even / multiple) * multiple


def column_tile(columns: int) -> int:
    """Columns of a tile of weights."""
    return even_tile(columns, _COLUMNS, 128)


def tile_length(length: int, size: int, rows: int) -> int | None:
    """A divisor of K, and a multiple or a divisor of the group size, for tiles of so many rows."""
    wanted = _LENGTH_OF_MANY_ROWS if rows > _MANY_ROWS else _LENGTH
    tiles = [t for t in range(128, length, 128) if length % t == 0] + [length]
    most = min(4 * wanted, _MOST_GROUPS_OF_TILE * size)
    tiles = [t for t in tiles if (t % size == 0 or size % t == 0) and t <= most]
    return min(tiles, key=lambda t: max(t / wanted, wanted / t), default=None)


def in_hbm(x: jax.Array, interpret: bool) -> jax.Array:
    """An operand of which a kernel reads a part: XLA might copy all of it into VMEM before."""
    return x if interpret else pltpu.with_memory_space_constraint(x, pltpu.HBM)


def result_type(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, like: jax.Array
) -> jax.ShapeDtypeStruct:
    """A result that varies across devices as `like` does inside `shard_map`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def _cost_of_dot(
    grid: tuple[int, ...],
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    parameters: int,
    dtype: jax.typing.DTypeLike,
) -> "pl.CostEstimate":
    """Memory traffic: x once per tile of columns, w and its scales once per tile of rows."""
    rows, (length, columns) = x.shape[0], w.shape
    per_row_tile = length * columns // 2 + parameters * 4 * scale.size
    once = rows * columns * jnp.dtype(dtype).itemsize
    return pl.CostEstimate(
        flops=2 * rows * length * columns,
        transcendentals=0,
        bytes_accessed=grid[0] * per_row_tile + grid[1] * x.nbytes + once,
    )
