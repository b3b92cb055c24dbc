"""Language models of the Llama family in plain JAX, written with the public operations.

The same functions run float and quantized parameters: `einsum`, `take` and `scan` accept both.
Prefill and decoding are one function, of many tokens or of one.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..core import ArrayConfig
from ..ops import einsum, kv, scan, take
from .mixture import mixture

Params = dict[str, Any]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Hyperparameters that do not follow from the shapes of the parameters.

    Attributes:
        heads: query heads of a layer.
        kv_heads: key and value heads, each of which several query heads share.
        layers: their number.
        epsilon: of the norms.
        experts_per_token: of layers that have a router instead of one set of kernels (`mixture`).
        expert_axis: the mesh axis among which experts are divided, or None.
    """

    heads: int
    kv_heads: int
    layers: int
    epsilon: float
    experts_per_token: int = 0
    expert_axis: str | None = None


def init_cache(
    params: Params,
    config: LlamaConfig,
    batch: int,
    length: int,
    store: jax.typing.DTypeLike | ArrayConfig = jnp.bfloat16,
) -> kv.Cache:
    """An empty cache for `length` tokens of each sequence; `store` as for `kv.init`."""
    size = 2 * params["frequencies"].shape[0]
    return kv.init(batch, config.kv_heads, length, size, store=store, layers=config.layers)


def forward(
    params: Params,
    config: LlamaConfig,
    tokens: jax.Array,
    cache: kv.Cache,
    counts: jax.Array | None = None,
) -> tuple[jax.Array, kv.Cache]:
    """Runs T further tokens of each sequence: a prompt, or the last token that was generated.

    Args:
        params: from `load_llama`, or quantized. Kernels are (N, K); those of consecutive layers
            that are quantized alike are stacked.
        config: also from `load_llama`.
        tokens: (B, T) ids.
        cache: the tokens so far, from `init_cache` or the previous call.
        counts: (B,), how many of the T tokens belong to each sequence; None for all.

    Returns:
        Vectors (B, T, D), which `logits` maps to logits of the next tokens, and the cache.

    Source: Touvron et al. 2023, arXiv:2302.13971.
    """
    positions = cache.lengths[0][:, None] + jnp.arange(tokens.shape[1])[None]
    rotation = _rotation(positions, params["frequencies"])

    def layer(experts, first, carry, weights):
        x, cache, index = carry
        weights = {**weights, **experts}
        x, cache = _layer(weights, config, x, rotation, cache, counts, index, index - first)
        return (x, cache, index + 1), None

    embedded = take(params["embedding"], tokens, axis=0, out_sharding=_on_all_devices())
    carry = embedded, cache, jnp.int32(0)
    first = 0
    for stack in params["layers"]:
        # Experts stay in the stack: in `shard_map`, slices would be copied for the kernels.
        experts = {name: x for name, x in stack.items() if name == "experts"}
        sliced = {name: x for name, x in stack.items() if name != "experts"}
        carry, _ = scan(partial(layer, experts, first), carry, sliced)
        first += stack["attention_norm"].shape[0]
    x, cache, _ = carry
    return _normalize(x, params["norm"], config.epsilon), cache


def decoder_layer(
    weights: Params, config: LlamaConfig, frequencies: jax.Array, x: jax.Array
) -> jax.Array:
    """One layer on whole sequences from their first token, as `tuning.sequential` needs it.

    Args:
        weights: of the layer, a slice of one of `params["layers"]`.
        config: from `load_llama`.
        frequencies: `params["frequencies"]`.
        x: (B, T, D), from the embedding or the layer before.

    Returns:
        (B, T, D).
    """
    batch, length, _ = x.shape
    rotation = _rotation(jnp.broadcast_to(jnp.arange(length), (batch, length)), frequencies)
    size = 2 * frequencies.shape[0]
    cache = kv.init(batch, config.kv_heads, length, size, store=x.dtype, layers=1)
    return _layer(weights, config, x, rotation, cache, None, jnp.int32(0), None)[0]


def logits(params: Params, x: jax.Array) -> jax.Array:
    """(B, T, D) -> (B, T, V) float32. The embedding is the head unless there is another."""
    head = params.get("head", params["embedding"])
    return einsum("btd,vd->btv", x, head).astype(jnp.float32)


@partial(jax.jit, donate_argnames="cache")
def next_token(
    params: Params,
    config: LlamaConfig,
    tokens: jax.Array,
    cache: kv.Cache,
    counts: jax.Array | None = None,
    temperature: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, kv.Cache]:
    """The token that follows each sequence, (B,), and the cache.

    Args:
        params, config, tokens, cache, counts: as for `forward`. The cache is donated.
        temperature, key: scalar and random key for sampling; both None for the most probable token.

    Raises:
        ValueError: only one of temperature and key is None.
    """
    if (temperature is None) != (key is None):
        raise ValueError(
            f"temperature and key must both be None or neither; got {temperature} and {key}. Pass "
            "key=jax.random.key(seed) to sample."
        )
    x, cache = forward(params, config, tokens, cache, counts)
    last = tokens.shape[1] - 1 if counts is None else (counts - 1)[:, None, None]
    last = jnp.broadcast_to(jnp.asarray(last, jnp.int32), (x.shape[0], 1, 1))
    found = logits(params, jnp.take_along_axis(x, last, 1))[:, 0]
    if temperature is None or key is None:
        return jnp.argmax(found, -1), cache
    return jax.random.categorical(key, found / temperature), cache


def _layer(
    weights: Params,
    config: LlamaConfig,
    x: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    cache: kv.Cache,
    counts: jax.Array | None,
    index: jax.Array,
    place: jax.Array | None,
) -> tuple[jax.Array, kv.Cache]:
    """One layer on further tokens of each sequence; experts are at `place` of their stack."""
    normed = _normalize(x, weights["attention_norm"], config.epsilon)
    query, key, value = _project(normed, weights, rotation, config)
    # The cache of all layers is carried, not sliced: it is updated in place.
    cache = kv.append(cache, key, value, counts, layer=index)
    mixed = kv.attend(query, cache, counts, layer=index)
    x = x + _dense(mixed.reshape(*x.shape[:2], -1), weights["out"], _on_all_devices())
    normed = _normalize(x, weights["mlp_norm"], config.epsilon)
    if "router" in weights:
        count, axis = config.experts_per_token, config.expert_axis
        return x + mixture(normed, weights, count, axis, place), cache
    gated = jax.nn.silu(_dense(normed, weights["gate"])) * _dense(normed, weights["up"])
    return x + _dense(gated, weights["down"], _on_all_devices()), cache


def _on_all_devices() -> jax.P | None:
    """How activations are sharded in a mesh with explicit axes, along which kernels may be."""
    return jax.P() if jax.sharding.get_abstract_mesh().explicit_axes else None


def _rotation(positions: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles of positions (B, T), (B, T, 1, D/2)."""
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def _project(
    x: jax.Array, weights: Params, rotation: tuple[jax.Array, jax.Array], config: LlamaConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries (B, T, N, D), keys and values (B, T, H, D), with positions rotated in."""
    query, key, value = (
        _dense(x, weights[name]).reshape(*x.shape[:2], heads, -1)
        for name, heads in (
            ("query", config.heads),
            ("key", config.kv_heads),
            ("value", config.kv_heads),
        )
    )
    return _rotate(query, rotation), _rotate(key, rotation), value


def _rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pairs of elements that are D/2 apart by their angle (B, T, 1, D/2).

    Source: Su et al. 2021, arXiv:2104.09864, with the pairs of Hugging Face's implementation.
    """
    cos, sin = rotation
    a, b = jnp.split(x.astype(cos.dtype), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _dense(x: jax.Array, weights: Params, out_sharding: jax.P | None = None) -> jax.Array:
    """x @ kernel.T, plus the bias if there is one; kernels are (N, K)."""
    out = einsum("btk,nk->btn", x, weights["kernel"], out_sharding=out_sharding)
    return out + weights["bias"][None, None] if "bias" in weights else out


def _normalize(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Source: Zhang and Sennrich 2019, arXiv:1910.07467."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(wide), -1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + epsilon)).astype(x.dtype) * scale[None, None]
