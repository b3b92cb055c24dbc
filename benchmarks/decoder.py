"""A small decoder-only transformer with a key-value cache, in plain JAX.

The same code runs float and quantized kernels: the function that multiplies by a kernel is an
argument, and `jaxquant.matmul` supports both.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jaxquant as jq

Params = dict[str, Any]
# (activations (M, K), kernel (K, N)) -> (M, N)
Product = Callable[[jax.Array, Any], jax.Array]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder. `length` is the capacity of the cache: prompt plus generated tokens."""

    layers: int = 4
    width: int = 1024
    heads: int = 16
    vocabulary: int = 8192
    length: int = 80


def random_params(config: DecoderConfig, seed: int = 0) -> Params:
    """Gaussian parameters; kernels are (K, N) under the name "kernel"."""
    keys = iter(jax.random.split(jax.random.key(seed), 4 * config.layers + 3))
    width = config.width

    def normal(*shape, size=1.0):
        return size * jax.random.normal(next(keys), shape, jnp.float32)

    def dense(inputs, outputs):
        return {"kernel": normal(inputs, outputs, size=1 / math.sqrt(inputs))}

    layers = [
        {
            "qkv": dense(width, 3 * width),
            "out": dense(width, width),
            "up": dense(width, 4 * width),
            "down": dense(4 * width, width),
            "norms": jnp.ones((2, width)),
        }
        for _ in range(config.layers)
    ]
    return {
        "tokens": normal(config.vocabulary, width),
        "positions": normal(config.length, width),
        "layers": layers,
        "norm": jnp.ones(width),
        "head": dense(width, config.vocabulary),
    }


def empty_cache(config: DecoderConfig, batch: int) -> list[jax.Array]:
    """Keys and values of each layer, (2, B, heads, length, size)."""
    size = config.width // config.heads
    shape = (2, batch, config.heads, config.length, size)
    return [jnp.zeros(shape, jnp.float32) for _ in range(config.layers)]


def step(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    cache: list[jax.Array],
    start: jax.Array | int,
    product: Product = jq.matmul,
) -> tuple[jax.Array, list[jax.Array]]:
    """Decodes some more tokens.

    Args:
        params: from `random_params`, or quantized.
        config: sizes.
        tokens: (B, T) at the positions start .. start + T - 1.
        cache: keys and values of all previous tokens.
        start: number of previous tokens.
        product: multiplies by a kernel.

    Returns:
        Logits (B, T, vocabulary), and the cache with these tokens.
    """
    positions = start + jnp.arange(tokens.shape[1])
    x = params["tokens"][tokens] + params["positions"][positions][None]
    filled = []
    for weights, old in zip(params["layers"], cache, strict=True):
        mixed, new = _attend(_normalize(x, weights["norms"][0]), weights, old, positions, product)
        x = x + mixed
        up = _dense(_normalize(x, weights["norms"][1]), weights["up"], product)
        x = x + _dense(jax.nn.relu(up), weights["down"], product)
        filled.append(new)
    return _dense(_normalize(x, params["norm"]), params["head"], product), filled


@partial(jax.jit, static_argnames=("config", "count", "product"))
def generate(
    params: Params,
    config: DecoderConfig,
    prompt: jax.Array,
    count: int,
    product: Product = jq.matmul,
) -> tuple[jax.Array, jax.Array]:
    """Continues a prompt by greedy decoding.

    Args:
        params, config, product: as for `step`.
        prompt: (B, P) tokens.
        count: tokens to generate; P + count - 1 <= config.length.

    Returns:
        Tokens (B, count), and the logits of the first one, (B, vocabulary).

    Raises:
        ValueError: the cache is too short.
    """
    batch, length = prompt.shape
    if length + count - 1 > config.length:
        raise ValueError(
            f"config.length must hold the prompt and all but the last token, {length} + "
            f"{count - 1}; got {config.length}."
        )
    logits, cache = step(params, config, prompt, empty_cache(config, batch), 0, product)

    def advance(carry, position):
        token, cache = carry
        logits, cache = step(params, config, token[:, None], cache, position, product)
        return (jnp.argmax(logits[:, -1], -1), cache), token

    first = jnp.argmax(logits[:, -1], -1)
    positions = length + jnp.arange(count - 1)
    (last, _), before = jax.lax.scan(advance, (first, cache), positions)
    return jnp.concatenate([before.T, last[:, None]], 1), logits[:, -1]


def _attend(x, weights, cache, positions, product):
    """Causal attention, and the cache with the new keys and values."""
    batch, count, width = x.shape
    heads, length, size = cache.shape[2:]
    qkv = _dense(x, weights["qkv"], product).reshape(batch, count, 3, heads, size)
    query, *new = qkv.transpose(2, 0, 3, 1, 4)
    cache = jax.lax.dynamic_update_slice_in_dim(cache, jnp.stack(new), positions[0], 3)
    scores = jnp.einsum("bhtd,bhsd->bhts", query, cache[0]) / math.sqrt(size)
    is_before = jnp.arange(length)[None, :] <= positions[:, None]
    scores = jnp.where(is_before[None, None], scores, -1e9)
    mixed = jnp.einsum("bhts,bhsd->bthd", jax.nn.softmax(scores), cache[1])
    return _dense(mixed.reshape(batch, count, width), weights["out"], product), cache


def _dense(x, weights, product):
    rows = product(x.reshape(-1, x.shape[-1]), weights["kernel"])
    return rows.astype(x.dtype).reshape(*x.shape[:-1], rows.shape[-1])


def _normalize(x, scale):
    mean = jnp.mean(jnp.square(x), -1, keepdims=True)
    return x * jax.lax.rsqrt(mean + 1e-6) * jnp.broadcast_to(scale, x.shape)
