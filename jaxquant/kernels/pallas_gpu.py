"""Pallas kernels for GPUs, by Triton: few rows by grouped 4-bit weights, and 8-bit codes by codes.

They are checked in interpret mode and were compiled by XLA for an H200, but have not run on a GPU:
the tile sizes are guesses. JAX deprecates Pallas' Triton backend from 0.11 on and warns when it
lowers such a kernel; they run only where `implementation="triton"` asks for them.
"""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .lazy import LazyModule

if TYPE_CHECKING:
    from jax.experimental import pallas as pl
else:  # Slow to import, and only programs for GPUs need it.
    pl = LazyModule("jax.experimental.pallas")
triton: Any = LazyModule("jax.experimental.pallas.triton")
# jaxlib for Windows lacks the first, and a later JAX will drop the second.
_TRITON = ("jaxlib.triton", "jax.experimental.pallas.triton")

# Tiles of x (rows, step) and of w (columns, step), powers of two as Triton requires. Tensor cores
# multiply at least 16 rows and 16 elements.
_LEAST_ROWS, _MOST_ROWS = 16, 64
_COLUMNS = 64
_LEAST_STEP, _MOST_STEP = 16, 128
# Sums are split among up to this many programs, four for each of the 132 SMs of an H200, to keep
# enough reads in flight; each sums at least _LEAST_STEPS steps.
_PROGRAMS = 528
_LEAST_STEPS = 4
# Dtypes of the codes that `scaled_dot` multiplies, and of their sums.
SUMS = {jnp.dtype(jnp.int8): jnp.int32, jnp.dtype(jnp.float8_e4m3fn): jnp.float32}


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """How `scaled_dot` divides its work.

    Attributes:
        columns, most_rows: size of a tile of the result.
        warps: how many compute a tile.
        stages: steps along K in flight: those being prefetched and the one being computed.
    """

    columns: int
    most_rows: int
    warps: int
    stages: int


# Few rows are bound by reading w: narrow tiles keep all SMs busy, with many reads in flight. Many
# rows are bound by arithmetic: two programs of 128 registers per thread and 96 KiB of shared
# memory fit an SM of an H200, and one fits every GPU from compute capability 8.0 on.
_FEW_ROWS = 64
_FOR_FEW = _Tiles(columns=32, most_rows=64, warps=4, stages=5)
_FOR_MANY = _Tiles(columns=128, most_rows=128, warps=8, stages=3)
# Tensor cores multiply at least 32 8-bit codes along K.
_LEAST_CODES, _MOST_CODES = 32, 128
# Tiles of rows that run together for all columns, so that their codes stay in the L2 cache: 16 of
# them are 8 MB if K is 4096.
_TILES_TOGETHER = 16
# JAX addresses arrays of up to 2**32 bytes by int32.
_MOST_OFFSETS = 2**31


@functools.cache
def why_unsupported_platform() -> str | None:
    """Why no kernel here can be compiled, or None."""
    has_triton = all(importlib.util.find_spec(module) for module in _TRITON)
    return None if has_triton else "this JAX does not include Triton"


def why_unsupported_groups(length: int, groups: int) -> str | None:
    """Why `grouped_dot` does not support this many groups along `length`, or None."""
    size = length // max(groups, 1)
    if _step(size) < _LEAST_STEP:
        return f"groups of {size} are not a multiple of {_LEAST_STEP}"
    return None


def why_unsupported_sizes(*sizes: int) -> str | None:
    """Why the kernels do not support arrays of these many 4-bit or 8-bit elements, or None."""
    if max(sizes) < _MOST_OFFSETS:
        return None
    return f"offsets in arrays of {max(sizes)} elements may overflow int32"


def grouped_dot(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """x @ ((w - zero) * scale).T, reading 4-bit weights and widening them in registers.

    Triton reads int4 arrays packed, two to a byte, only if slices of their last axis are static:
    so steps along K get their own axis. (Repacking them as bytes outside the kernel would
    cost a pass over the weights.)

    Args:
        x: float32, bfloat16 or float16, (M, K) with M > 0.
        w: 4-bit integers, (N, K).
        scale, zero: (N, groups), in groups that `why_unsupported_groups` accepts; a zero of None
            means 0.
        interpret: runs without a GPU, slowly, for tests.

    Returns:
        float32, (M, N).

    Error: codes minus zero points are exact in the dtype of x if those are integers or halves, and
        else rounded to it; sums are rounded as in float32. A GPU rounds a float32 x
        to TF32, as XLA does by default.
    """
    (rows, length), columns, groups = x.shape, w.shape[0], scale.shape[1]
    step = _step(length // groups)
    steps = length // step
    tile = min(max(pl.next_power_of_2(rows), _LEAST_ROWS), _MOST_ROWS)
    tiles = pl.cdiv(rows, tile), pl.cdiv(columns, _COLUMNS)
    splits = _splits(steps, math.prod(tiles))
    parameters = [v.astype(jnp.float32) for v in (scale, zero) if v is not None]
    per_column = pl.BlockSpec((_COLUMNS, groups), lambda i, j, k: (j, 0))
    parts = pl.pallas_call(
        functools.partial(
            _sum_of_steps,
            shape=(rows, columns),
            # As Python integers they would be traced as 64 bits under x64.
            steps=np.int32(steps // splits),
            steps_of_group=np.int32(steps // groups),
        ),
        grid=(*tiles, splits),
        in_specs=[
            pl.BlockSpec((tile, steps, step), lambda i, j, k: (i, 0, 0)),
            pl.BlockSpec((_COLUMNS, steps, step), lambda i, j, k: (j, 0, 0)),
            *[per_column] * len(parameters),
        ],
        out_specs=pl.BlockSpec((None, tile, _COLUMNS), lambda i, j, k: (k, i, j)),
        out_shape=jax.ShapeDtypeStruct(
            (splits, rows, columns),
            jnp.float32,
            manual_axis_type=jax.typeof(x).manual_axis_type,
        ),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_dot",
    )(x.reshape(rows, steps, step), w.reshape(columns, steps, step), *parameters)
    return parts.sum(0)


def scaled_dot(
    x: jax.Array,
    w: jax.Array,
    row_scale: jax.Array,
    column_scale: jax.Array,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """(x @ w.T) * row_scale[:, None] * column_scale, stored once, in `dtype`.

    Sums stay in registers: neither they nor their float32 values go through memory. Tiles that
    reach beyond the operands read zeros, so all sizes are supported.

    Args:
        x: codes with a dtype in `SUMS`, (M, K), not empty.
        w: codes of the same dtype, (N, K).
        row_scale: float32, (M,).
        column_scale: float32, (N,).
        dtype: of the result: float32, bfloat16 or float16.
        interpret: runs without a GPU, slowly, for tests.

    Returns:
        `dtype`, (M, N).

    Error: sums of int8 are exact if they fit in int32, and rounded once to float32; each scale
        and `dtype` add one rounding. Sums of float8_e4m3fn are float32; some tensor cores
        add 32 products less precisely. Others, such as an H200's through JAX 0.10, multiply these
        codes as float16, exactly and no faster.
    """
    (rows, length), columns = x.shape, w.shape[0]
    plan = _FOR_FEW if rows <= _FEW_ROWS else _FOR_MANY
    tile = min(max(pl.next_power_of_2(rows), _LEAST_ROWS), plan.most_rows), plan.columns
    step = min(max(pl.next_power_of_2(length), _LEAST_CODES), _MOST_CODES)
    row_tiles = pl.cdiv(rows, tile[0])
    rounds = pl.cdiv(row_tiles, _TILES_TOGETHER)
    together = pl.cdiv(row_tiles, rounds)

    def row(r: Any, j: Any, first: Any) -> Any:
        return first * together + r

    return pl.pallas_call(
        functools.partial(_scaled_tile, row=row, shape=(rows, columns), step=step),
        grid=(together, pl.cdiv(columns, tile[1]), rounds),
        in_specs=[
            pl.BlockSpec((tile[0], length), lambda *place: (row(*place), 0)),
            pl.BlockSpec((tile[1], length), lambda r, j, first: (j, 0)),
            pl.BlockSpec((tile[0],), lambda *place: (row(*place),)),
            pl.BlockSpec((tile[1],), lambda r, j, first: (j,)),
        ],
        out_specs=pl.BlockSpec(tile, lambda r, j, first: (row(r, j, first), j)),
        out_shape=jax.ShapeDtypeStruct(
            (rows, columns), dtype, manual_axis_type=jax.typeof(x).manual_axis_type
        ),
        compiler_params=triton.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        interpret=interpret,
        name="scaled_dot",
    )(x, w, row_scale, column_scale)


def _scaled_tile(
    x_ref: Any,
    w_ref: Any,
    row_scale_ref: Any,
    column_scale_ref: Any,
    out_ref: Any,
    *,
    row: Callable[..., Any],
    shape: tuple[int, int],
    step: int,
) -> None:
    """One tile of the scaled result. Elements outside the result are not stored."""
    tile, length = out_ref.shape, x_ref.shape[1]
    place = row(*(pl.program_id(a) for a in range(3))), pl.program_id(1)
    has_row, has_column = (
        p * t + jnp.arange(t, dtype=jnp.int32) < n
        for p, t, n in zip(place, tile, shape, strict=True)
    )

    def add_step(number: Any, total: jax.Array) -> jax.Array:
        first = number * step
        codes = pl.ds(first, step)
        has_code = (first + jnp.arange(step, dtype=jnp.int32) < length)[None, :]
        # 0 in both operands: 0 times a float8 NaN would be NaN.
        x, w = (
            triton.load(
                ref.at[:, codes], mask=has[:, None] & has_code, other=jnp.zeros((), ref.dtype)
            )
            for ref, has in ((x_ref, has_row), (w_ref, has_column))
        )
        return total + triton.dot(x, w, trans_b=True)

    zeros = jnp.zeros(tile, SUMS[x_ref.dtype])
    total = lax.fori_loop(np.int32(0), np.int32(pl.cdiv(length, step)), add_step, zeros)
    out = total.astype(jnp.float32) * triton.load(row_scale_ref, mask=has_row)[:, None]
    out = out * triton.load(column_scale_ref, mask=has_column)[None, :]
    triton.store(out_ref, out.astype(out_ref.dtype), mask=has_row[:, None] & has_column[None, :])


def _sum_of_steps(
    x_ref: Any,
    w_ref: Any,
    *refs: Any,
    shape: tuple[int, int],
    steps: np.int32,
    steps_of_group: np.int32,
) -> None:
    """One tile of the result, summed over `steps` of K. Elements outside it are not stored."""
    *parameters, out_ref = refs
    tile = out_ref.shape
    has_row, has_column = (
        pl.program_id(a) * tile[a] + jnp.arange(tile[a], dtype=jnp.int32) < shape[a] for a in (0, 1)
    )
    first = pl.program_id(2) * steps

    def add_step(number: Any, total: jax.Array) -> jax.Array:
        k = first + number
        # Neither is negative.
        group = lax.div(k, steps_of_group)
        scale, *zero = (triton.load(p.at[:, group], mask=has_column) for p in parameters)
        x = triton.load(x_ref.at[:, k, :], mask=has_row[:, None])
        codes = triton.load(w_ref.at[:, k, :], mask=has_column[:, None])
        # Through int8: Triton's conversion from 4 bits to floats is rarely used.
        codes = codes.astype(jnp.int8).astype(x.dtype)
        codes = codes - zero[0].astype(x.dtype)[:, None] if zero else codes
        product = triton.dot(x, codes, trans_b=True)
        return total + product * scale[None, :]

    total = lax.fori_loop(np.int32(0), steps, add_step, jnp.zeros(tile, jnp.float32))
    triton.store(out_ref, total, mask=has_row[:, None] & has_column[None, :])


def _step(size: int) -> int:
    """The largest power of two that divides a group, at most `_MOST_STEP`."""
    return math.gcd(size, _MOST_STEP)


def _splits(steps: int, tiles: int) -> int:
    """How many programs share the steps of each tile."""
    most = min(_PROGRAMS // tiles, steps // _LEAST_STEPS)
    return max((n for n in range(1, most + 1) if steps % n == 0), default=1)
