"""Attention over a cache: by a kernel on CPU and on TPU, by XLA elsewhere."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...core import bits_of
from ...jaxprs import Function, is_sharded, on_one_cpu, on_one_tpu
from ...kernels import cpu, pallas_tpu, pallas_tpu_attention
from ..gradient import tangent_of
from ..operands import has_symbolic_shape
from .cache import Cache, as_counts, as_numbers, at_layer, check_layer
from .own_heads import on_own_heads
from .writing import in_stack, is_for_kernel, is_sliced

# Query rows of a key head in a decoding step, at most.
_FEW_ROWS = 64


def attend(
    query: jax.Array | np.ndarray,
    cache: Cache,
    counts: jax.typing.ArrayLike | None = None,
    *,
    layer: jax.typing.ArrayLike | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Causal attention of the tokens that were appended last, over all tokens so far.

        p[t, s]   = softmax over s <= position of t of (scale * query[t] . keys[s])
        out[t]    = sum over s of p[t, s] * values[s]

    Several query heads may share a key head (grouped-query attention): query head n reads key head
    n // (N / H). Scales of a quantized cache multiply the scores and p, not the codes. On CPU and
    TPU, a kernel runs block by block (FlashAttention) in programs for one device, and reads no
    positions behind the last token. If sequences or heads of the cache are sharded along explicit
    axes of a mesh, each device runs it on its own part. XLA computes the rest: programs that it
    partitions, caches of other dtypes, and derivatives.

    Args:
        query: floats (B, T, N, D), with N a multiple of H.
        cache: after `append`.
        counts: as for `append`.
        layer: index of the layer, if the cache has several.
        scale: factor of the scores; None for 1 / sqrt(D).

    Returns:
        (B, T, N, D) in the dtype of query, computed in float32 (float64 for float64 queries).
        Arbitrary finite values for padding; NaN for a sequence that exceeded the capacity.

    Raises:
        ValueError: shapes do not match, or `layer` is missing or, where it is known, too large.

    Source: Ainslie et al. 2023, arXiv:2305.13245 (grouped-query attention); Dao et al. 2022,
        arXiv:2205.14135, algorithm 1 (blocks).

    Example:
        >>> cache = jq.kv.init(1, heads=1, length=8, size=4)
        >>> cache = jq.kv.append(cache, jnp.ones((1, 2, 1, 4)), jnp.full((1, 2, 1, 4), 3.0))
        >>> jq.kv.attend(jnp.ones((1, 2, 2, 4)), cache)[0, 1].tolist()
        [[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]]
    """
    batch, heads = check_layer(cache, layer)
    query = jnp.asarray(query)
    is_fit = query.ndim == 4 and (query.shape[0], query.shape[3]) == (batch, cache.size)
    if not is_fit or query.shape[2] % heads:
        raise ValueError(
            f"query must be (B, T, N, D) with {batch} sequences, heads of {cache.size} and a "
            f"multiple of {heads} heads; got {query.shape}."
        )
    dtype = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    scaled = query.astype(dtype) * (cache.size**-0.5 if scale is None else scale)
    counts = as_counts(counts, batch, query.shape[1])
    run = partial(_attend, query.dtype)
    return on_own_heads(run, cache, counts, layer, scaled)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(
    dtype: np.dtype, cache: Cache, counts: jax.Array | None, layer: Any, query: jax.Array
) -> jax.Array:
    """The result in `dtype`; NaN for sequences that exceeded the capacity."""
    by_xla, branches = _in_dtype(_by_xla, dtype), {}
    if _is_for_cpu(query, cache):
        branches["cpu"] = partial(on_one_cpu, _in_dtype(_natively, dtype), by_xla)
    if _is_for_tpu(query, cache):
        branches["tpu"] = partial(on_one_tpu, partial(_by_pallas, dtype), by_xla)
    if not branches:
        return by_xla(cache, counts, layer, query)
    return lax.platform_dependent(cache, counts, layer, query, **branches, default=by_xla)


@partial(_attend.defjvp, symbolic_zeros=True)
def _(dtype: np.dtype, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    out = _attend(dtype, *primals)
    return out, tangent_of(_in_dtype(_by_xla, dtype), primals, tangents, out)


def _in_dtype(run: Function, dtype: np.dtype) -> Function:
    return lambda *args: run(*args).astype(dtype)


def _is_for_cpu(query: jax.Array, cache: Cache) -> bool:
    """Whether the native kernel computes this on CPU."""
    is_read = cache.dtype in (jnp.float32, jnp.bfloat16) or bits_of(cache.dtype) <= 8
    return is_read and _is_plain(query, cache) and cpu.unavailable() is None


def _is_for_tpu(query: jax.Array, cache: Cache) -> bool:
    """Whether the Pallas kernel computes this on TPU."""
    # XLA would copy shorter heads of floats into another layout.
    fits = cache.size % (8 if cache.dtype == jnp.int8 else 128) == 0
    fits &= cache.capacity <= pallas_tpu_attention.MOST_POSITIONS
    # A scatter of many tokens into several heads takes longer in the layout that the kernel reads.
    tokens, heads = query.shape[1], cache.keys.shape[-3]
    is_decoding = tokens * query.shape[2] <= _FEW_ROWS * heads
    fits &= heads == 1 or is_decoding or is_sliced(cache, tokens)
    is_read = fits and cache.dtype in (jnp.float32, jnp.bfloat16, jnp.int8)
    is_one_pass = jax.default_matmul_precision.value in pallas_tpu.ONE_PASS
    return is_read and is_one_pass and _is_plain(query, cache)


def _is_plain(query: jax.Array, cache: Cache) -> bool:
    arrays = jax.tree.leaves((query, cache))
    is_plain = not any(is_sharded(x) or has_symbolic_shape(x) for x in arrays)
    return is_plain and query.dtype == jnp.float32 and 0 not in query.shape


def _natively(cache: Cache, counts: jax.Array | None, layer: Any, query: jax.Array) -> jax.Array:
    """On the stored bytes of all layers, of which the kernel reads one."""
    keys, values, place = _in_stack(cache, layer)
    key_scale, value_scale = (
        _scale_of(x, cache, layer) for x in (cache.key_scale, cache.value_scale)
    )
    starts = _starts(query, cache, counts, layer)
    out = cpu.attend(query, keys, values, cache.dtype, key_scale, value_scale, starts, place)
    return _unless_full(out, cache, layer)


def _by_pallas(
    dtype: np.dtype, cache: Cache, counts: jax.Array | None, layer: Any, query: jax.Array
) -> jax.Array:
    """On the stored bytes of all layers, too."""
    keys, values, place = _in_stack(cache, layer)
    scales = tuple(x for x in (cache.key_scale, cache.value_scale) if x is not None)
    if is_for_kernel(cache, query.shape[1], layer):
        scales = in_stack(scales, layer)
    else:  # A scatter of XLA has left the scales of all layers in other tiles.
        slices = (_scale_of(x, cache, layer) for x in scales)
        scales = tuple(x[None] for x in slices if x is not None)
    (lengths,) = in_stack((cache.lengths,), layer)
    if lengths.size > pallas_tpu_attention.MOST_LENGTHS:
        lengths = at_layer(cache.lengths, layer)[None]
    result = dtype if dtype == jnp.bfloat16 else jnp.float32
    return pallas_tpu_attention.attend(
        query,
        (keys, values),
        scales,
        cache.dtype,
        lengths,
        counts,
        place,
        dtype_of_result=result,
    ).astype(dtype)


def _starts(query: jax.Array, cache: Cache, counts: jax.Array | None, layer: Any) -> jax.Array:
    """(B,): token t of the query sees the positions up to starts + t."""
    return at_layer(cache.lengths, layer) - (query.shape[1] if counts is None else counts)


def _unless_full(out: jax.Array, cache: Cache, layer: Any) -> jax.Array:
    """NaN for sequences that exceeded the capacity."""
    fits = at_layer(cache.lengths, layer) <= cache.capacity
    return jnp.where(fits[:, None, None, None], out, jnp.nan)


def _in_stack(cache: Cache, layer: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values with an axis of layers, and the layer."""
    keys, values = in_stack((cache.keys, cache.values), layer)
    return keys, values, jnp.asarray(0 if layer is None else layer, jnp.int32)


def _by_xla(cache: Cache, counts: jax.Array | None, layer: Any, query: jax.Array) -> jax.Array:
    keys, values = (
        as_numbers(at_layer(x, layer), cache.dtype, cache.size).astype(query.dtype)
        for x in (cache.keys, cache.values)
    )
    batch, count, heads, size = query.shape
    grouped = query.reshape(batch, count, keys.shape[1], heads // keys.shape[1], size)
    scores = jnp.einsum("bthgd,bhsd->bhgts", grouped, keys)
    if (factor := _scale_of(cache.key_scale, cache, layer)) is not None:
        scores *= factor[:, :, None, None].astype(scores.dtype)
    starts = _starts(query, cache, counts, layer)
    positions = starts[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    is_seen = jnp.arange(cache.capacity, dtype=jnp.int32)[None, None] <= positions[..., None]
    scores = jnp.where(is_seen[:, None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores)
    if (factor := _scale_of(cache.value_scale, cache, layer)) is not None:
        weights *= factor[:, :, None, None].astype(weights.dtype)
    out = jnp.einsum("bhgts,bhsd->bthgd", weights, values).reshape(query.shape)
    return _unless_full(out, cache, layer)


def _scale_of(scale: jax.Array | None, cache: Cache, layer: Any) -> jax.Array | None:
    """One layer's (B, H, S), which scores or weights are multiplied with; None for 1."""
    if cache.config is None or scale is None:
        return None
    return as_numbers(at_layer(scale, layer), jnp.dtype(cache.config.stored_scale_dtype))
