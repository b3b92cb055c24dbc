"""Writes tokens into the arrays of a cache.

A few by a kernel on TPU where it can; those of prompts as slices, since XLA copies the arrays of
all layers for a scatter there.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...core import AbsMax
from ...jaxprs import is_sharded, on_one_tpu
from ...kernels import pallas_tpu_append
from ..operands import has_symbolic_shape

Arrays = tuple[jax.Array, ...]
# Floats (..., D) -> what a cache stores of them: codes or floats (..., D), and scales (..., 1).
Encode = Callable[[jax.Array], Arrays]


class Place(NamedTuple):
    """Where T tokens of each sequence are written.

    Attributes:
        starts: (B,): token t of sequence b is written at starts[b] + t.
        counts: (B,): of the T tokens, the first ones are written, if they are below S; None for
            all.
        layer: which of L; None for arrays without layers.
    """

    starts: jax.Array
    counts: jax.Array | None
    layer: Any


def write(cache: Any, encode: Encode, new: Arrays, place: Place) -> dict[str, jax.Array]:
    """The arrays of a cache with T further tokens of each sequence, by name.

    Args:
        cache: a `Cache`.
        encode: of keys, and of values.
        new: keys and values of the tokens, floats (B, T, H, D).
        place: where they are written.
    """
    stored, count = stored_arrays(cache), new[0].shape[1]
    run = _slice_on_tpu if is_sliced(cache, count) else _scatter
    if is_for_kernel(cache, count, place.layer):
        run = _write
    written = run(encode, tuple(stored.values()), new, place)
    return dict(zip(stored, written, strict=True))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _write(encode: Encode, stored: Arrays, new: Arrays, place: Place) -> Arrays:
    by_xla = partial(_scatter, encode)
    on_tpu = partial(on_one_tpu, partial(_by_pallas, encode), by_xla)
    return lax.platform_dependent(stored, new, place, tpu=on_tpu, default=by_xla)


@_write.defjvp
def _(encode: Encode, primals: Any, tangents: Any) -> tuple[Arrays, Arrays]:
    return _write(encode, *primals), jax.jvp(partial(_scatter, encode), primals, tangents)[1]


def is_for_kernel(cache: Any, tokens: int, layer: Any) -> bool:
    """Whether the kernel writes so many tokens of each sequence of a cache on a TPU."""
    stored, config = tuple(stored_arrays(cache).values()), cache.config
    # Mosaic compiles no other conversions.
    is_simple = cache.dtype in (jnp.float32, jnp.bfloat16) and config is None
    if config is not None:
        is_simple = cache.dtype == jnp.int8 and isinstance(config.range, AbsMax)
        is_simple &= config.stored_scale_dtype == "float32"
    fits = is_simple and _is_plain(stored)
    return fits and pallas_tpu_append.is_supported(in_stack(stored, layer), tokens)


def is_sliced(cache: Any, tokens: int) -> bool:
    """Whether so many tokens of each sequence, more than the kernel writes, are slices on a TPU."""
    return tokens > pallas_tpu_append.MOST_TOKENS and _is_plain(stored_arrays(cache).values())


def stored_arrays(cache: Any) -> dict[str, jax.Array]:
    """Keys, values and, if there are, their scales, by name."""
    names = ("keys", "values", "key_scale", "value_scale")
    return {name: x for name in names if (x := getattr(cache, name)) is not None}


def in_stack(stored: Arrays, layer: Any) -> Arrays:
    """The arrays with an axis of layers."""
    return stored if layer is not None else tuple(x[None] for x in stored)


def _by_pallas(encode: Encode, stored: Arrays, new: Arrays, place: Place) -> Arrays:
    starts, counts, layer = place
    index = jnp.asarray(0 if layer is None else layer, jnp.int32)
    found = pallas_tpu_append.append(in_stack(stored, layer), new, encode, starts, counts, index)
    return tuple(x if layer is not None else x[0] for x in found)


def _is_plain(stored: Iterable[jax.Array]) -> bool:
    return not any(is_sharded(x) or has_symbolic_shape(x) for x in stored)


def _encoded(encode: Encode, new: Arrays) -> Arrays:
    """What is stored of keys and values, in the order of the arrays: (B, T, H, ...)."""
    codes, *scales = zip(*map(encode, new), strict=True)
    return *codes, *(x[..., 0] for pair in scales for x in pair)


def _slice_on_tpu(encode: Encode, stored: Arrays, new: Arrays, place: Place) -> Arrays:
    runs = [partial(run, encode) for run in (_slice, _scatter)]
    return lax.platform_dependent(stored, new, place, tpu=runs[0], default=runs[1])


def _slice(encode: Encode, stored: Arrays, new: Arrays, place: Place) -> Arrays:
    """Writes T positions of each sequence as one slice; those without a token keep their values."""
    starts, counts, layer = place
    index = jnp.asarray(0 if layer is None else layer, starts.dtype)
    zero = jnp.zeros((), starts.dtype)  # Places must be of one type, also where ints have 64 bits.
    arrays, encoded = in_stack(stored, layer), _encoded(encode, new)
    length, limit = new[0].shape[1], arrays[0].shape[3]
    # Token t of a sequence is in slot t + moved: slices at the end begin before its tokens.
    first = jnp.minimum(starts, limit - length)
    moved = starts - first
    ends = moved + (length if counts is None else counts)
    padded = []
    for x, n in zip(arrays, encoded, strict=True):
        tokens = jnp.moveaxis(n, 1, 2).astype(x.dtype)
        padded.append(jnp.concatenate([jnp.zeros_like(tokens), tokens], 2))

    def write_sequence(b: jax.Array, arrays: Arrays) -> Arrays:
        found = []
        for x, tokens in zip(arrays, padded, strict=True):
            rest = x.shape[4:]
            at = (index, b.astype(starts.dtype), zero, first[b], *(zero,) * len(rest))
            own = lax.dynamic_index_in_dim(tokens, b, 0)
            own = lax.dynamic_slice_in_dim(own, length - moved[b], length, 2)
            slot = jnp.arange(length, dtype=starts.dtype).reshape(length, *(1,) * len(rest))
            is_token = (moved[b] <= slot) & (slot < ends[b])
            old = lax.dynamic_slice(x, at, (1, 1, x.shape[2], length, *rest))
            found.append(lax.dynamic_update_slice(x, jnp.where(is_token, own[None], old), at))
        return tuple(found)

    found = lax.fori_loop(0, len(starts), write_sequence, arrays)
    return tuple(x if layer is not None else x[0] for x in found)


def _scatter(encode: Encode, stored: Arrays, new: Arrays, place: Place) -> Arrays:
    starts, counts, layer = place
    batch, count = new[0].shape[:2]
    index = jnp.arange(count, dtype=starts.dtype)[None]
    positions = starts[:, None] + index
    if counts is not None:  # Positions behind the last one are not written.
        positions = jnp.where(index < counts[:, None], positions, stored[0].shape[-2])
    at = (jnp.arange(batch)[:, None], slice(None), positions)
    at = at if layer is None else (layer, *at)
    found = _encoded(encode, new)
    return tuple(x.at[at].set(n, mode="drop") for x, n in zip(stored, found, strict=True))
