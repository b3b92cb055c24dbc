"""Compares schemes on the encoder: size, similarity to float32, and speed."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

from .. import core
from .. import tree as trees
from ..core import ArrayConfig, MinMSE, Percentile, Scheme
from .encoder import EncoderConfig, Params, embed
from .text import Tokens

_NEIGHBOURS = 10


def _with_weights(scheme: Scheme, **changes: Any) -> Scheme:
    return dataclasses.replace(scheme, weights=dataclasses.replace(scheme.weights, **changes))


SCHEMES: Mapping[str, Scheme | ArrayConfig] = {
    "W8A8": core.W8A8,
    "W8A16": core.W8A16,
    "W4A16 g128": core.W4A16,
    "W4A16 g128, percentile 99.9": _with_weights(core.W4A16, range=Percentile(99.9)),
    "W4A16 g128, least squares": _with_weights(core.W4A16, range=MinMSE()),
    "W4A16 g128 asymmetric": core.W4A16_ASYM,
    "W4A16 g32": _with_weights(core.W4A16, group_size=32),
    "W4A16 g32 asymmetric": _with_weights(core.W4A16_ASYM, group_size=32),
    "FP8": core.FP8,
    "NF4A16 g64": core.NF4A16,
    "MXFP8A8": core.MXFP8A8,
    "MXFP4A16": core.MXFP4A16,
    "NVFP4A16": core.NVFP4A16,
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One scheme on the encoder.

    Attributes:
        name: of the scheme.
        megabytes: size of all parameters in 10^6 bytes.
        bits_per_weight: of all parameters.
        cosine: mean cosine of a sentence's vector with that of float32.
        overlap: fraction of a sentence's 10 nearest neighbours that are the same as in float32.
        milliseconds: per sentence, median of the passes.
        ratio: time of float32 over that of the scheme, median of alternating passes.
    """

    name: str
    megabytes: float
    bits_per_weight: float
    cosine: float
    overlap: float
    milliseconds: float
    ratio: float


def compare(
    params: Params,
    config: EncoderConfig,
    tokens: Tokens,
    schemes: Mapping[str, Scheme | ArrayConfig] = SCHEMES,
    *,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> list[Result]:
    """Runs the encoder with each scheme, float32 first.

    Args:
        params, config: from `load_encoder`.
        tokens: sentences, at least 11 of them.
        schemes: by name, for the table.
        progress: function of (schemes done, schemes in all, name), called after each; float32
            counts as one.

    Returns:
        One result per scheme, after that of float32.

    Raises:
        ValueError: there are fewer than 11 sentences.
    """
    if tokens.count <= _NEIGHBOURS:
        raise ValueError(
            f"tokens must hold {_NEIGHBOURS + 1} sentences or more, so that each has {_NEIGHBOURS} "
            f"neighbours; got {tokens.count}. Tokenize more."
        )
    vectors = embed_all(params, config, tokens)
    total = len(schemes) + 1
    results = [_measure("float32", params, params, config, tokens, vectors)]
    progress(1, total, "float32")
    for name, scheme in schemes.items():
        # Kernels are (N, K): the contracted axis is the last.
        quantized = trees.quantize(params, trees.default_rules(scheme, axis=-1))
        results.append(_measure(name, params, quantized, config, tokens, vectors))
        progress(len(results), total, name)
    return results


def _measure(
    name: str,
    params: Params,
    quantized: Params,
    config: EncoderConfig,
    tokens: Tokens,
    vectors: np.ndarray,
) -> Result:
    weights = sum(x.size for x in jax.tree.leaves(params))
    size = sum(core.packed_bytes(x) for x in jax.tree.leaves(quantized))
    found = embed_all(quantized, config, tokens)
    milliseconds, ratio = _time(params, quantized, config, tokens)
    return Result(
        name,
        megabytes=size / 1e6,
        bits_per_weight=8 * size / weights,
        cosine=float(np.mean(np.sum(found * vectors, 1))),
        overlap=overlap_of(found, vectors),
        milliseconds=milliseconds,
        ratio=ratio,
    )


def embed_all(params: Params, config: EncoderConfig, tokens: Tokens) -> np.ndarray:
    """The vectors of all sentences."""
    batches = [
        embed(params, config, ids, mask) for ids, mask in zip(tokens.ids, tokens.mask, strict=True)
    ]
    return np.concatenate([np.asarray(b) for b in batches])[: tokens.count]


def overlap_of(found: np.ndarray, vectors: np.ndarray) -> float:
    """The fraction of the 10 nearest neighbours of each vector that is the same in both sets."""
    neighbours = [_nearest(v) for v in (found, vectors)]
    shared = [len(set(a) & set(b)) for a, b in zip(*neighbours, strict=True)]
    return float(np.mean(shared)) / _NEIGHBOURS


def _nearest(vectors: np.ndarray) -> np.ndarray:
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1)[:, :_NEIGHBOURS]


def _time(
    params: Params, quantized: Params, config: EncoderConfig, tokens: Tokens, passes: int = 7
) -> tuple[float, float]:
    """Milliseconds per sentence, and the ratio to float32; medians of alternating passes."""

    def run(weights):
        start = time.perf_counter()
        jax.block_until_ready(embed(weights, config, tokens.ids[0], tokens.mask[0]))
        return time.perf_counter() - start

    # Both are compiled already: `_measure` ran them on all sentences.
    pairs = [(run(params), run(quantized)) for _ in range(passes)]
    ratio = statistics.median(exact / ours for exact, ours in pairs)
    ours = statistics.median(ours for _, ours in pairs)
    return 1e3 * ours / tokens.ids.shape[1], ratio


_COLUMNS: tuple[tuple[str, rich.console.JustifyMethod], ...] = (
    ("scheme", "left"),
    ("MB", "right"),
    ("bits per weight", "right"),
    ("cosine", "right"),
    ("10-NN overlap", "right"),
    ("ms per sentence", "right"),
    ("speed, float32 = 1", "right"),
)


def table(results: list[Result]) -> rich.table.Table:
    """Returns the results as a rich table; schemes slower than float32 are red."""
    out = rich.table.Table(title="Sentence encoder, quantized")
    for name, justify in _COLUMNS:
        out.add_column(name, justify=justify)
    for r in results:
        style = "red" if r.ratio < 0.95 else None
        out.add_row(*cells(r), style=style)
    return out


def cells(result: Result) -> tuple[str, ...]:
    """A result as the texts of a row."""
    return (
        result.name,
        f"{result.megabytes:.1f}",
        f"{result.bits_per_weight:.2f}",
        f"{result.cosine:.4f}",
        f"{result.overlap:.3f}",
        f"{result.milliseconds:.2f}",
        f"{result.ratio:.2f}",
    )
