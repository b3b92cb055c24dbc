"""Stores keys and values, as floats or as codes with a scale per token."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...core import (
    ArrayConfig,
    bits_of,
    bits_to_float,
    float_to_bits,
    pack_int4,
    packed_bytes,
    quantize,
    unpack_int4,
)
from ...jaxprs import is_tracer
from .own_heads import on_own_heads
from .writing import Place, write


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Cache:
    """Keys and values of B sequences, whose lengths may differ. A pytree.

    Invariants (not checked, because JAX rebuilds pytrees with tracers as fields):

    - `keys` and `values` are (B, H, S, D), or (L, B, H, S, D) for L layers. Codes of 4 bits are
      packed two per byte along D. Floats of 8 and 16 bits are stored as unsigned integers of the
      same bits, which XLA on CPU updates in place;
    - `key_scale` and `value_scale` have their shape without D; None in a cache of floats;
    - positions from `lengths` on hold zeros, or finite values that `attend` does not use.

    Attributes:
        keys, values: floats or codes, as they are stored.
        key_scale, value_scale: one step per token and head, in units of the key or value per code.
        lengths: tokens in each sequence, int32 (B,) or (L, B). More than `capacity` if tokens were
            appended beyond it under jit; `attend` then returns NaN for the sequence.
        size: D, static.
        dtype: of the floats or codes, static.
        config: how keys and values are quantized; None for floats. Static.

    Example:
        >>> cache = jq.kv.init(2, heads=4, length=16, size=8, store=jnp.bfloat16)
        >>> cache.capacity, cache.lengths.tolist(), cache.nbytes
        (16, [0, 0], 4096)
    """

    keys: jax.Array
    values: jax.Array
    key_scale: jax.Array | None
    value_scale: jax.Array | None
    lengths: jax.Array
    size: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    config: ArrayConfig | None = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Number S of positions."""
        return self.keys.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales."""
        arrays = self.keys, self.values, self.key_scale, self.value_scale
        return sum(packed_bytes(x) for x in arrays if x is not None)

    def __repr__(self) -> str:
        return f"Cache({self.dtype}, {self.keys.shape[:-1]} by {self.size})"


def init(
    batch: int,
    heads: int,
    length: int,
    size: int,
    *,
    store: jax.typing.DTypeLike | ArrayConfig = jnp.bfloat16,
    layers: int | None = None,
) -> Cache:
    """An empty cache.

    Args:
        batch: number B of sequences.
        heads: number H of key and value heads.
        length: number S of positions, for the prompt and all generated tokens.
        size: elements D of a head.
        store: a float dtype of 8 bits or more; or a symmetric config of 8-bit or 4-bit codes, which
            get one scale per token and head.
        layers: number of layers that share the cache, each addressed by `layer=`. Keep such a cache
            in the carry of a loop over layers, where it is updated in place. None for one layer.

    Raises:
        ValueError: a number is not positive, or keys and values cannot be stored so.

    Example:
        >>> jq.kv.init(1, 2, 100, 64, store=jq.ArrayConfig(format=jq.INT4), layers=30)
        Cache(int4, (30, 1, 2, 100) by 64)
    """
    lead = (batch,) if layers is None else (layers, batch)
    shape = (*lead, heads, length, size)
    if min(shape) < 1:
        raise ValueError(f"batch, heads, length, size and layers must be positive; got {shape}.")
    lengths = jnp.zeros(lead, jnp.int32)
    if not isinstance(store, ArrayConfig):
        dtype = jax.dtypes.canonicalize_dtype(store)
        if not jnp.issubdtype(dtype, jnp.floating) or bits_of(dtype) < 8:
            raise ValueError(
                "store must be a float dtype of 8 bits or more, or an ArrayConfig; got "
                f"{jnp.dtype(store)}. For integers, pass ArrayConfig(format=INT8)."
            )
        keys, values = (_as_stored(jnp.zeros(shape, dtype)) for _ in range(2))
        return Cache(keys, values, None, None, lengths, size, dtype, None)
    _check_config(store)
    dtype = jnp.dtype(store.format.dtype)
    keys, values = (_as_stored(jnp.zeros(shape, dtype)) for _ in range(2))
    ones = [jnp.ones(shape[:-1], store.stored_scale_dtype) for _ in range(2)]
    key_scale, value_scale = map(_as_stored, ones)
    return Cache(keys, values, key_scale, value_scale, lengths, size, dtype, store)


def append(
    cache: Cache,
    keys: jax.Array | np.ndarray,
    values: jax.Array | np.ndarray,
    counts: jax.typing.ArrayLike | None = None,
    *,
    layer: jax.typing.ArrayLike | None = None,
) -> Cache:
    """Writes the keys and values of T further tokens behind those of each sequence.

    Args:
        cache: from `init`.
        keys, values: floats (B, T, H, D).
        counts: integers (B,), how many of the T tokens belong to each sequence: the first ones. The
            others are padding and are not written. None for all T.
        layer: index of the layer, if the cache has several.

    Returns:
        The cache with the tokens, and `lengths` increased by counts. Donate the old one under jit,
        so that it is updated in place. On TPU, a kernel quantizes and writes up to 8 tokens of each
        sequence, if heads have a multiple of 128 elements and the cache a multiple of 128
        positions; XLA writes more than that as one slice per sequence, and others by a scatter.

    Raises:
        ValueError: shapes do not match, T exceeds the capacity, or, where the numbers are known
            (outside jit), the layer does not exist, counts are not 0 to T, or tokens do not fit.
            Under jit, counts are clipped to 0 to T, and a sequence that does not fit has a length
            above the capacity afterwards, and `attend` returns NaN for it.

    Error: half a scale per element if the cache is quantized: 1/254 of the largest magnitude of
        the token's head in INT8, 1/14 in INT4.

    Example:
        >>> cache = jq.kv.init(2, heads=1, length=8, size=4)
        >>> prompts = jnp.ones((2, 5, 1, 4))
        >>> jq.kv.append(cache, prompts, prompts, counts=jnp.array([5, 3])).lengths.tolist()
        [5, 3]
    """
    batch, heads = check_layer(cache, layer)
    count = keys.shape[1] if keys.ndim == 4 else 0
    expected = (batch, count, heads, cache.size)
    if keys.shape != expected or values.shape != expected:
        raise ValueError(
            f"keys and values must be (B, T, H, D) with {batch} sequences of {heads} heads of "
            f"{cache.size}; got {keys.shape} and {values.shape}."
        )
    counts = as_counts(counts, batch, count)
    _check_room(cache, at_layer(cache.lengths, layer), counts, count)
    new = jnp.asarray(keys), jnp.asarray(values)
    return on_own_heads(_append, cache, counts, layer, *new, returns_cache=True)


def _append(
    cache: Cache, counts: jax.Array | None, layer: Any, keys: jax.Array, values: jax.Array
) -> Cache:
    lengths = at_layer(cache.lengths, layer)
    after = lengths + (keys.shape[1] if counts is None else counts)
    if layer is not None:
        after = lax.dynamic_update_index_in_dim(cache.lengths, after, layer, 0)
    encode = partial(_encode, dtype=cache.dtype, config=cache.config)
    written = write(cache, encode, (keys, values), Place(lengths, counts, layer))
    return dataclasses.replace(cache, lengths=after, **written)


def _check_config(config: ArrayConfig) -> None:
    format = config.format
    is_fit = config.symmetric and not config.per_tensor and format.codebook is None
    is_fit &= config.group_size is None and format.group_size is None
    is_packed = format.bits == 4 and jnp.issubdtype(format.dtype, jnp.signedinteger)
    is_fit &= format.bits == 8 or is_packed
    if not is_fit or bits_of(config.stored_scale_dtype) < 16:
        raise ValueError(
            "store must be a symmetric config of int8, int4 or float8 codes with one float scale "
            f"per token and head; got {config}. Pass ArrayConfig(format=INT8), for example."
        )


def check_layer(cache: Cache, layer: Any) -> tuple[int, int]:
    """(B, H), after checking that a layer is named if and only if there are several."""
    if (layer is None) != (cache.keys.ndim == 4):
        wanted = "None for a cache of one layer" if layer is not None else "the index of a layer"
        raise ValueError(f"layer must be {wanted}; got {layer} for {cache}.")
    layers = cache.keys.shape[0]
    if layer is not None and not is_tracer(layer) and not -layers <= int(layer) < layers:
        raise ValueError(f"layer must be one of the {layers} of the cache; got {layer}.")
    return cache.keys.shape[-4], cache.keys.shape[-3]


def as_counts(counts: Any, batch: int, count: int) -> jax.Array | None:
    """Number of tokens per sequence, as int32; None for `count` of each.

    Raises:
        ValueError: they are not integers from 0 to `count`, one per sequence.
    """
    if counts is None:
        return None
    counts = jnp.asarray(counts)
    if counts.shape != (batch,) or not jnp.issubdtype(counts.dtype, jnp.integer):
        raise ValueError(
            f"counts must be {batch} integers, one per sequence; got {counts.dtype} {counts.shape}."
        )
    known = None if is_tracer(counts) else np.asarray(counts)
    if known is not None and np.any(np.clip(known, 0, count) != known):
        raise ValueError(
            f"counts must be 0 to {count}, the number of tokens that are passed; got "
            f"{known.tolist()}."
        )
    return jnp.clip(counts.astype(jnp.int32), 0, count)


def _check_room(cache: Cache, lengths: jax.Array, counts: jax.Array | None, count: int) -> None:
    """Raises if it is known that a sequence would exceed the capacity."""
    is_known = not (is_tracer(lengths) or is_tracer(counts))
    counts = jnp.full(lengths.shape, count) if counts is None else counts
    most = int(np.max(np.asarray(lengths + counts))) if is_known else 0
    if most > cache.capacity:
        raise ValueError(
            f"The cache has {cache.capacity} positions; got tokens up to position {most - 1} "
            f"(lengths {lengths.tolist()}, appended {counts.tolist()}). Make a longer cache."
        )
    if count > cache.capacity:
        raise ValueError(
            f"The cache has {cache.capacity} positions; got {count} tokens at once. Make a longer "
            "cache."
        )


def at_layer(x: jax.Array, layer: Any) -> jax.Array:
    """The part of a stack that belongs to a layer; all of x if `layer` is None."""
    return x if layer is None else jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)


def _encode(x: jax.Array, dtype: Any, config: ArrayConfig | None) -> tuple[jax.Array, ...]:
    """Keys or values as they are stored, and their scales, if they have some."""
    if config is None:
        return (_as_stored(x.astype(dtype)),)
    q = quantize(x, config, axis=-1)
    assert isinstance(q.scale, jax.Array)  # `_check_config` excludes nested scales.
    return _as_stored(q.codes), _as_stored(q.scale)


def _as_stored(x: jax.Array) -> jax.Array:
    return pack_int4(x, axis=-1) if bits_of(x.dtype) == 4 else float_to_bits(x)


def as_numbers(x: jax.Array, dtype: jax.typing.DTypeLike, size: int = 1) -> jax.Array:
    """Inverse of `_as_stored`, except that 4-bit codes are returned as int8."""
    if bits_of(dtype) == 4:
        # XLA on CPU would read an array of int4 one element at a time.
        return unpack_int4(x, size, axis=-1)
    return bits_to_float(x, dtype)
