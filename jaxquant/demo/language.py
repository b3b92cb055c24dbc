"""Compares schemes on a language model: size, closeness to float32 on held-out text, and speed."""

import dataclasses
import itertools
import pydoc_data.topics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from .. import core
from .. import tree as trees
from ..core import ArrayConfig, Scheme
from .generate import STORES, generate, requantize
from .llama import LlamaConfig, Params, forward, init_cache, logits
from .llama_files import LlamaModel


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of the table: how parameters are quantized, and how keys and values are stored.

    Attributes:
        scheme: what parameters are requantized to; None for float32, or for `as_stored`.
        as_stored: whether parameters are left as the file has them.
        store: name of the store of keys and values.
    """

    scheme: Scheme | ArrayConfig | None = None
    as_stored: bool = False
    store: str = "float32"

    def __post_init__(self) -> None:
        if self.as_stored and self.scheme is not None:
            raise ValueError(
                f"as_stored leaves parameters as they are; got it with scheme={self.scheme}. Give "
                "one of them."
            )


_G32 = dataclasses.replace(core.W4A16.weights, group_size=32)
VARIANTS: Mapping[str, Variant] = {
    "float32": Variant(),
    "as stored": Variant(as_stored=True),
    "W8A8": Variant(core.W8A8),
    "W8A16": Variant(core.W8A16),
    "W4A16 g32": Variant(Scheme(_G32)),
    "W4A8 g32": Variant(Scheme(_G32, core.W4A8.inputs)),
    "NVFP4A16": Variant(core.NVFP4A16),
    "float32, int8 keys and values": Variant(store="int8"),
    "float32, int4 keys and values": Variant(store="int4"),
}
# Tokens of held-out text in each window, and of the prompt whose prefill is timed.
_WINDOW = 256
_DECODED = 24


@dataclasses.dataclass(frozen=True)
class LanguageResult:
    """One variant of a language model.

    Attributes:
        name: of the variant.
        megabytes: size of all parameters in 10^6 bytes.
        bits_per_weight: of all parameters.
        cache_kilobytes: keys and values of one token, in 10^3 bytes.
        divergence: mean Kullback-Leibler divergence of the next token from float32's, in nats.
        agreement: fraction of tokens whose most probable successor is that of float32.
        prefill, decode: tokens per second, of a prompt and one by one.
    """

    name: str
    megabytes: float
    bits_per_weight: float
    cache_kilobytes: float
    divergence: float
    agreement: float
    prefill: float
    decode: float


def held_out_text() -> str:
    """Text of Python's documentation, which is installed with Python."""
    paragraphs = [" ".join(t.split()) for t in pydoc_data.topics.topics.values()]
    return "\n".join(paragraphs)


def compare_language(
    model: LlamaModel,
    tokens: np.ndarray,
    variants: Mapping[str, Variant] = VARIANTS,
    *,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> list[LanguageResult]:
    """Runs the model in each variant.

    Args:
        model: from `load_llama`.
        tokens: (windows, T) ids of held-out text.
        variants: by name, for the table.
        progress: function of (variants done, variants in all, name), called after each.

    Returns:
        One result per variant.
    """
    floats = requantize(model.params, None)
    exact = [_log_probabilities(floats, model.config, w, "float32") for w in tokens]
    results = []
    for name, variant in variants.items():
        params = _params_of(model, floats, variant)
        results.append(_measure(name, variant, params, model, tokens, exact))
        progress(len(results), len(variants), name)
    return results


def _params_of(model: LlamaModel, floats: Params, variant: Variant) -> Params:
    if variant.as_stored:
        return model.params
    return requantize(floats, variant.scheme) if variant.scheme is not None else floats


def windows(ids: Iterable[int], count: int, length: int = _WINDOW) -> np.ndarray:
    """The first `count` windows of `length` ids.

    Raises:
        ValueError: there are fewer ids, or count is not positive.
    """
    found = list(itertools.islice(ids, max(count, 0) * length))
    if count < 1 or len(found) < count * length:
        raise ValueError(
            f"The text must have 1 window of {length} tokens or more, and as many as are asked "
            f"for; got {count} windows of a text with {len(found)} tokens up to there."
        )
    return np.array(found, np.int32).reshape(count, length)


@partial(jax.jit, static_argnames="store")
def _log_probabilities(
    params: Params, config: LlamaConfig, tokens: jax.Array, store: str
) -> jax.Array:
    """Of each token that may follow each token: (T,) -> (T, V)."""
    cache = init_cache(params, config, 1, tokens.shape[0], STORES[store])
    x, _ = forward(params, config, tokens[None], cache)
    return jax.nn.log_softmax(logits(params, x)[0])


@jax.jit
def _differences(found: jax.Array, exact: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean divergence and agreement."""
    divergence = jnp.sum(jnp.exp(exact) * (exact - found), -1)
    return divergence.mean(), jnp.mean(jnp.argmax(found, -1) == jnp.argmax(exact, -1))


def _measure(
    name: str,
    variant: Variant,
    params: Params,
    model: LlamaModel,
    tokens: np.ndarray,
    exact: list[jax.Array],
) -> LanguageResult:
    differences, seconds = [], []
    # The first call compiles.
    jax.block_until_ready(_log_probabilities(params, model.config, tokens[0], variant.store))
    for window, wanted in zip(tokens, exact, strict=True):
        start = time.perf_counter()
        found = _log_probabilities(params, model.config, window, variant.store)
        jax.block_until_ready(found)
        seconds.append(time.perf_counter() - start)
        differences.append(_differences(found, wanted))
    prefill = tokens.shape[1] / min(seconds)
    divergence, agreement = np.mean(np.array(differences, np.float64), 0).tolist()
    weights = sum(x.size for x in jax.tree.leaves(model.params, is_leaf=trees.is_quantized))
    size = sum(core.packed_bytes(x) for x in jax.tree.leaves(params))
    cache = init_cache(params, model.config, 1, 1, STORES[variant.store])
    return LanguageResult(
        name,
        megabytes=size / 1e6,
        bits_per_weight=8 * size / weights,
        cache_kilobytes=cache.nbytes / 1e3,
        divergence=divergence,
        agreement=agreement,
        prefill=prefill,
        decode=_decode_speed(dataclasses.replace(model, params=params), tokens[0], variant.store),
    )


def _decode_speed(model: LlamaModel, prompt: np.ndarray, store: str) -> float:
    """Tokens per second, from the third on: the first two include compilation."""
    times = [
        time.perf_counter()
        for _ in generate(model, prompt[:8].tolist(), _DECODED, store=STORES[store])
    ]
    return 1 / float(np.median(np.diff(times[1:])))


_COLUMNS: tuple[tuple[str, rich.console.JustifyMethod], ...] = (
    ("scheme", "left"),
    ("MB", "right"),
    ("bits per weight", "right"),
    ("KV kB per token", "right"),
    ("mean KL", "right"),
    ("top-1 agreement", "right"),
    ("prefill tokens/s", "right"),
    ("decode tokens/s", "right"),
)


def language_table(results: list[LanguageResult]) -> rich.table.Table:
    """Returns the results as a rich table."""
    out = rich.table.Table(
        title="Language model, quantized",
        caption="float32: the model's file is quantized, and this is what it dequantizes to.",
    )
    for name, justify in _COLUMNS:
        out.add_column(name, justify=justify)
    for r in results:
        out.add_row(*language_cells(r))
    return out


def language_cells(result: LanguageResult) -> tuple[str, ...]:
    """A result as the texts of a row."""
    return (
        result.name,
        f"{result.megabytes:.1f}",
        f"{result.bits_per_weight:.2f}",
        f"{result.cache_kilobytes:.1f}",
        f"{result.divergence:.4f}",
        f"{result.agreement:.3f}",
        f"{result.prefill:.0f}",
        f"{result.decode:.1f}",
    )
