"""A Pallas kernel for TPUs: keys and values of a few tokens are written into a cache in place.

XLA quantizes them and computes the places of scatters by a dozen small fusions for each layer, and
keeps the scales of all layers in another layout than attention reads. The kernel is compiled for
v5e and v6e and checked in interpret mode; it has not run on a TPU yet.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

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

# Tokens of a sequence, which lie in two tiles at most.
MOST_TOKENS = 8
_LANES, _SUBLANES = 128, 8
# Bytes of the tiles of all sequences, which are in VMEM together.
_MOST_BYTES = 8 * 2**20


def is_supported(stored: Sequence[jax.Array], tokens: int) -> bool:
    """Whether `append` writes so many tokens of each sequence.

    Args:
        stored: as for `append`.
        tokens: T.
    """
    _, _, heads, positions, size = stored[0].shape
    most = max(_window(x, tokens) for x in stored)
    is_whole = all(positions % _tile(x) == 0 for x in stored) and positions >= most
    # XLA stores shorter heads in another layout, and the scales of other numbers of heads.
    has_scales = len(stored) > 2
    is_fit = size % _LANES == 0 and not (has_scales and heads % _SUBLANES and _SUBLANES % heads)
    is_held = _window_bytes(stored, tokens) <= _MOST_BYTES
    return is_whole and is_fit and is_held and 0 < tokens <= MOST_TOKENS


def append(
    stored: Sequence[jax.Array],
    new: Sequence[jax.Array],
    encode: Callable[[jax.Array], Sequence[jax.Array]],
    starts: jax.Array,
    counts: jax.Array | None,
    layer: jax.Array,
    *,
    interpret: bool = False,
) -> list[jax.Array]:
    """Writes T tokens per sequence into the arrays of a cache, of which it reads only their tiles.

    Args:
        stored: keys and values (L, B, H, S, D) of at least 8 bits, and, if they have scales, theirs
            (L, B, H, S) in float32.
        new: keys and values of the tokens, floats (B, T, H, D).
        encode: float32 (n, D) -> what is stored of them: codes or floats (n, D), and scales (n, 1).
            Mosaic must be able to compile it.
        starts: (B,): token t of sequence b is written at starts[b] + t.
        counts: (B,): of the T tokens, the first ones are written, if they are below S; None for
            all.
        layer: scalar, which of the L layers; -1 is the last one.
        interpret: runs without a TPU, slowly, for tests.

    Returns:
        `stored` with the tokens, in place if it is donated.
    """
    batch, tokens, heads, size = new[0].shape
    rows = [x.reshape(-1, size) for x in new]
    rows = [x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32) for x in rows]
    # Of 32 bits, because single rows of fewer are in another layout.
    wide = [pltpu.VMEM(x.shape, jnp.float32) for x in rows]
    windows = [
        pltpu.VMEM((batch, heads, _window(x, tokens), *x.shape[4:]), x.dtype) for x in stored
    ]
    held = [pallas_tpu.in_hbm(x, interpret) for x in stored]
    given = [layer.reshape(1), starts, *([] if counts is None else [counts])]
    numbers = [pl.BlockSpec(memory_space=pltpu.SMEM)] * len(given)
    in_place = [pl.BlockSpec(memory_space=pl.ANY if interpret else pltpu.HBM)] * len(held)
    kernel = functools.partial(
        _append, encode=encode, has_counts=counts is not None, tokens=tokens, arrays=len(held)
    )
    return pl.pallas_call(
        kernel,
        in_specs=[*numbers, *[pl.BlockSpec()] * len(rows), *in_place],
        out_specs=in_place,
        out_shape=[pallas_tpu.result_type(x.shape, x.dtype, x) for x in held],
        scratch_shapes=[*wide, *windows, pltpu.SemaphoreType.DMA((2,))],
        input_output_aliases={len(given) + len(rows) + i: i for i in range(len(held))},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=pallas_tpu.VMEM_LIMIT),
        cost_estimate=_cost(stored, tokens),
        interpret=interpret,
        name="append",
    )(*given, *rows, *held)


def _append(
    layer: Any, starts: Any, *refs: Any, encode: Any, has_counts: bool, tokens: int, arrays: int
) -> None:
    """Reads the tiles that hold the tokens of each sequence, sets these, and writes the tiles."""
    counts, refs = (refs[0], refs[1:]) if has_counts else (None, refs)
    given, refs = refs[:2], refs[2:]
    stored, results, refs = refs[:arrays], refs[arrays : 2 * arrays], refs[2 * arrays :]
    (*new,), (*windows, semaphores) = refs[:2], refs[2:]
    for x, wide in zip(given, new, strict=True):
        wide[...] = x[...].astype(jnp.float32)
    layers, batch = stored[0].shape[:2]
    own = lax.rem(layer[0] + layers, layers)

    def place(x: Any, b: Any) -> Any:
        """The window of a sequence: whole tiles, of which the first holds the first token."""
        tile, size = _tile(x), _window(x, tokens)
        first = jnp.minimum(lax.div(starts[b], tile) * tile, x.shape[3] - size)
        return pl.ds(pl.multiple_of(first, tile), size)

    def reads(b: Any) -> list[Any]:
        return [
            pltpu.make_async_copy(x.at[own, b, :, place(x, b)], window.at[b], semaphores.at[0])
            for x, window in zip(stored, windows, strict=True)
        ]

    def writes(b: Any) -> list[Any]:
        return [
            pltpu.make_async_copy(window.at[b], x.at[own, b, :, place(x, b)], semaphores.at[1])
            for x, window in zip(results, windows, strict=True)
        ]

    def change(b: Any) -> None:
        count = new[0].shape[0] // batch
        rows = pl.ds(b * count, count)
        codes, *scales = zip(*(encode(x[rows]) for x in new), strict=True)
        found = *codes, *(x for pair in scales for x in pair)
        for values, x, window in zip(found, stored, windows, strict=True):
            start = starts[b] - place(x, b).start
            _set(window, values, b, start, tokens if counts is None else counts[b])

    _for_each(batch, lambda b: [copy.start() for copy in reads(b)])
    _for_each(batch, lambda b: [copy.wait() for copy in reads(b)])
    _for_each(batch, change)
    _for_each(batch, lambda b: [copy.start() for copy in writes(b)])
    _for_each(batch, lambda b: [copy.wait() for copy in writes(b)])


def _for_each(count: int, run: Callable[[Any], Any]) -> None:
    def step(i: Any, _: None) -> None:
        run(i)

    lax.fori_loop(0, count, step, None)


def _set(window: Any, values: jax.Array, b: Any, start: Any, count: Any) -> None:
    """Sets the tokens of one sequence in its window, from rows of T x H."""
    heads, is_scale = window.shape[1], window.ndim == 3
    values = _in_32_bits(values)
    for h in range(heads):
        # Scales are a row of a tile, keys and values are rows.
        here = (b, pl.ds(h, 1)) if is_scale else (b, h)
        found = _in_32_bits(window[here])
        place = lax.broadcasted_iota(jnp.int32, found.shape, int(is_scale))
        for t in range(len(values) // heads):
            row = t * heads + h
            found = jnp.where((place == start + t) & (t < count), values[row : row + 1], found)
        window[here] = found.astype(window.dtype)


def _in_32_bits(x: jax.Array) -> jax.Array:
    """Numbers that Mosaic selects from."""
    return x if x.dtype.itemsize == 4 else x.astype(jnp.int32)


def _tile(x: Any) -> int:
    """Positions in one tile of an array of a cache."""
    return _LANES if x.ndim == 4 else 4 * _SUBLANES // x.dtype.itemsize


def _window(x: Any, tokens: int) -> int:
    """Positions of the tiles that hold so many tokens."""
    return _tile(x) * (1 if tokens == 1 else 2)


def _window_bytes(stored: Sequence[jax.Array], tokens: int) -> int:
    """Bytes of the tiles that hold the tokens, of all sequences."""
    return sum(
        x.size // x.shape[0] // x.shape[3] * _window(x, tokens) * x.dtype.itemsize for x in stored
    )


def _cost(stored: Sequence[jax.Array], tokens: int) -> "pl.CostEstimate":
    read = _window_bytes(stored, tokens)
    return pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=2 * read)
