"""A small transformer that predicts the next byte of a text, in plain JAX on jaxquant's operations.

The same code runs float, prepared and quantized parameters. Layers are a list, not a stack: where
gradients are taken, loops slice 4-bit arrays slowly on CPU.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq

Params = dict[str, Any]
# (inputs (..., K), kernel of (K, N)) -> (..., N)
Product = Callable[[jax.Array, Any], jax.Array]
BYTES = 256


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BytesConfig:
    """Sizes. `hidden` is the width of the MLP; each position sees the last `seen` bytes."""

    layers: int = 4
    width: int = 128
    hidden: int = 768
    heads: int = 4
    seen: int = 4
    length: int = 64


def random_params(config: BytesConfig, key: jax.Array) -> Params:
    """Gaussian parameters of unit gain; kernels are (K, N) under the name "kernel"."""
    keys = iter(jax.random.split(key, 4 * config.layers + 2))
    width, hidden = config.width, config.hidden

    def dense(inputs, outputs, gain=1.0):
        values = jax.random.normal(next(keys), (inputs, outputs), jnp.float32)
        return {"kernel": gain / math.sqrt(inputs) * values}

    # What is added to the residual grows by one such product per half layer.
    gain = 1 / math.sqrt(2 * config.layers)
    layers = [
        {
            "qkv": dense(width, 3 * width),
            "out": dense(width, width, gain),
            "up": dense(width, hidden),
            "down": dense(hidden, width, gain),
            "norms": jnp.ones((2, width)),
        }
        for _ in range(config.layers)
    ]
    return {
        "embedding": jax.random.normal(next(keys), (config.seen, BYTES, width), jnp.float32)
        / math.sqrt(config.seen),
        "layers": layers,
        "norm": jnp.ones(width),
        "head": dense(width, BYTES),
    }


def logits(
    params: Params, config: BytesConfig, text: jax.Array, product: Product = jq.matmul
) -> jax.Array:
    """Logits of the next byte at each position.

    Args:
        params: from `random_params`, prepared, or quantized.
        config: sizes.
        text: (B, T) bytes, T at most `config.length`.
        product: multiplies by the kernels of the layers.

    Returns:
        (B, T, 256) logits.
    """
    x = sum(_embed(table, text, back) for back, table in enumerate(params["embedding"]))
    for weights in params["layers"]:
        x = x + _attend(_normalize(x, weights["norms"][0]), weights, config, product)
        up = product(_normalize(x, weights["norms"][1]), weights["up"]["kernel"])
        x = x + product(jax.nn.gelu(up), weights["down"]["kernel"])
    return jq.matmul(_normalize(x, params["norm"]), params["head"]["kernel"])


def next_byte_loss(
    params: Params, config: BytesConfig, windows: jax.Array, product: Product = jq.matmul
) -> jax.Array:
    """Mean cross entropy of each byte of (B, T + 1) windows but the first, in nats."""
    found = jax.nn.log_softmax(logits(params, config, windows[:, :-1], product))
    wanted = windows[:, 1:, None].astype(jnp.int32)
    return -jnp.mean(jnp.take_along_axis(found, wanted, -1))


def _embed(table, text, back):
    """The contribution of the byte `back` positions earlier; zero at the start."""
    rows = jq.take(table, text[:, : text.shape[1] - back], axis=0)
    return jnp.pad(rows, ((0, 0), (back, 0), (0, 0)))


def _attend(x, weights, config: BytesConfig, product):
    """Causal attention."""
    batch, length, width = x.shape
    qkv = product(x, weights["qkv"]["kernel"]).reshape(batch, length, 3, config.heads, -1)
    query, key, value = (qkv[:, :, i] for i in range(3))
    scores = jq.einsum("bthd,bshd->bhts", query, key) / math.sqrt(width // config.heads)
    scores = scores + _bias(length, config.heads)[None]
    mixed = jq.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), value)
    return product(mixed.reshape(batch, length, width), weights["out"]["kernel"])


def _bias(length, heads):
    """(heads, T, T): steeper heads attend less far back; masked to be causal.

    Source: Press et al. 2022 (ALiBi), arXiv:2108.12409, section 3.
    """
    distance = np.subtract.outer(np.arange(length), np.arange(length))
    slopes = 2.0 ** (-8 * np.arange(1, heads + 1) / heads)
    return np.where(distance < 0, -1e9, -slopes[:, None, None] * distance).astype(np.float32)


def _normalize(x, scale):
    mean = jnp.mean(jnp.square(x), -1, keepdims=True)
    return x * jax.lax.rsqrt(mean + 1e-6) * jnp.broadcast_to(scale, x.shape)
