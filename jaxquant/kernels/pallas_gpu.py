"""Products of few rows with grouped 4-bit weights on a GPU, by Pallas through Triton.

Lowered to Triton's language and checked in interpret mode; it was never compiled for a GPU, run or
timed on one. Tile sizes are therefore guesses.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

triton: Any
try:
    from jax.experimental.pallas import triton
except ImportError:  # Not in jaxlib for Windows; JAX 0.11 says that it will go from all.
    triton = None

# Tiles of x (rows, step) and of w (columns, step), powers of two as Triton wants them. 16 rows and
# 16 elements are the least that tensor cores multiply.
_LEAST_ROWS, _MOST_ROWS = 16, 64
_COLUMNS = 64
_LEAST_STEP, _MOST_STEP = 16, 128
# Sums are split among programs up to so many, four for each of the 132 processors of an H200, to
# have enough reads under way; each adds up so many steps at least.
_PROGRAMS = 528
_LEAST_STEPS = 4


def refuses_groups(length: int, groups: int) -> str | None:
    """Why `grouped_dot` does not take weights with so many scales along `length`, or None."""
    if triton is None:
        return "this JAX has no Triton"
    size = length // max(groups, 1)
    if _step(size) < _LEAST_STEP:
        return f"groups of {size} are no multiple of {_LEAST_STEP}"
    return None


def grouped_dot(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """x @ ((w - zero) * scale).T, the weights read as 4-bit codes and widened in registers.

    Triton reads int4 arrays two to a byte as they lie, if they are sliced along their last axis
    where it is known beforehand: so steps along K are an axis of their own. (Bytes made outside
    would cost a pass over the weights: XLA computes conversions between widths.)

    Args:
        x: float32, bfloat16 or float16, (M, K) with M > 0.
        w: 4-bit whole numbers, (N, K).
        scale, zero: (N, groups), groups that `refuses_groups` admits; a zero of None is 0.
        interpret: whether to compute without a GPU, slowly, for tests.

    Returns:
        float32, (M, N).

    Error: codes less zero points are exact in the dtype of x, and sums are rounded as in float32.
        A GPU rounds a float32 x to TF32, as XLA does by default.
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
            # 32 bits also where Python's numbers would be traced as 64.
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


def _sum_of_steps(x_ref, w_ref, *refs, shape, steps, steps_of_group):
    """One tile of the result, summed over `steps` of K. What lies outside is never stored."""
    *parameters, out_ref = refs
    tile = out_ref.shape
    has_row, has_column = (
        pl.program_id(a) * tile[a] + jnp.arange(tile[a], dtype=jnp.int32) < shape[a] for a in (0, 1)
    )
    first = pl.program_id(2) * steps

    def add_step(number, total):
        k = first + number
        # Of whole numbers from 0 up.
        group = lax.div(k, steps_of_group)
        scale, *zero = (triton.load(p.at[:, group], mask=has_column) for p in parameters)
        x = triton.load(x_ref.at[:, k, :], mask=has_row[:, None])
        codes = triton.load(w_ref.at[:, k, :], mask=has_column[:, None])
        # By int8: from 4 bits to floats is no conversion that is often asked of Triton.
        codes = codes.astype(jnp.int8).astype(x.dtype)
        codes = codes - zero[0].astype(x.dtype)[:, None] if zero else codes
        product = triton.dot(x, codes, trans_b=True)
        return total + product * scale[None, :]

    total = lax.fori_loop(np.int32(0), steps, add_step, jnp.zeros(tile, jnp.float32))
    triton.store(out_ref, total, mask=has_row[:, None] & has_column[None, :])


def _step(size: int) -> int:
    """The largest power of two that divides a group and is no longer than `_MOST_STEP`."""
    return math.gcd(size, _MOST_STEP)


def _splits(steps: int, tiles: int) -> int:
    """Among how many programs the steps of each tile are divided."""
    most = min(_PROGRAMS // tiles, steps // _LEAST_STEPS)
    return max((n for n in range(1, most + 1) if steps % n == 0), default=1)
