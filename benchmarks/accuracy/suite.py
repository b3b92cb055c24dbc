"""`python -m benchmarks --suite accuracy`: methods on a language model at equal bits."""

import argparse
import dataclasses
import resource
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

import jaxquant as jq
from jaxquant import demo
from jaxquant.methods import MaxAbs, MeanAbs, SecondMoment

from . import language, peers, rows

_CALIBRATION, _TEST = 48, 16


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        bits: name of the config.
        bits_per_weight: of the kernels; the embedding has 8 bits everywhere.
        name: of the method.
        text: that it was tested on; it was calibrated on another.
        seed: of the windows.
        divergence, agreement, perplexity: as for `language.Distance`.
        seconds: that quantizing took, compilation included, without the statistics.
        peak_mib: most memory of the process so far.
    """

    bits: str
    bits_per_weight: float
    name: str
    text: str
    seed: int
    divergence: float
    agreement: float
    perplexity: float
    seconds: float
    peak_mib: float


def suite(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all rows, prints the table and returns the results."""
    console = rich.console.Console()
    model = language.load_model(channel_scales=arguments.channel_scales)
    texts = list(language.texts())
    found: list[Result] = []
    for seed in range(arguments.seeds):
        for text in texts[: arguments.texts]:
            (other,) = (name for name in texts if name != text)
            found += _run(model, other, text, seed, arguments, console)
            console.print(table(found))
    if arguments.picture:
        from .picture import plot

        plot(found, arguments.picture)
    return {"results": [dataclasses.asdict(r) for r in found]}


def _run(
    model: language.LanguageModel,
    calibration: str,
    test: str,
    seed: int,
    arguments: argparse.Namespace,
    console: rich.console.Console,
) -> list[Result]:
    """All rows of one seed and one pair of texts."""
    texts = language.texts()
    calibrating = language.windows(model, texts[calibration], arguments.windows, seed)
    judge = language.Judge(model, language.windows(model, texts[test], _TEST, seed))
    batches = list(language.batches(calibrating))
    collect = partial(
        jq.collect, partial(language.apply, config=model.config), model.params, batches
    )
    start = time.perf_counter()
    statistics = collect(
        language.rules(jq.ArrayConfig()), [SecondMoment, MeanAbs, MaxAbs], progress=True
    )
    console.print(f"Statistics of {calibrating.size} tokens: {time.perf_counter() - start:.0f} s")
    found = []
    for bits in arguments.bits or rows.CONFIGS:
        config = rows.CONFIGS[bits]
        for name, row in rows.ROWS.items():
            if not _is_wanted(name, arguments.only):
                continue
            start = time.perf_counter()
            if row.is_sequential:
                tree = _layer_by_layer(model, config, row, batches)
            else:
                tree = quantized(model, config, row, statistics)
            seconds = time.perf_counter() - start
            distance = judge.distance(tree)
            count = rows.bits_of(config)
            found.append(_result(bits, count, name, test, seed, distance, seconds))
            console.print(found[-1])
    library = peers.ggml()
    for name, (number, bits) in peers.GGML_TYPES.items() if library else ():
        if not _is_wanted(name, arguments.only):
            continue
        start = time.perf_counter()
        layers = peers.by_ggml(library, number, model.params["layers"][0], statistics)
        seconds = time.perf_counter() - start
        tree = {**quantized_head(model), "layers": (layers,)}
        distance = judge.distance(tree)
        found.append(_result(f"{bits}", bits, name, test, seed, distance, seconds))
        console.print(found[-1])
    return found


def _is_wanted(name: str, only: Sequence[str] | None) -> bool:
    """Whether a row is among those asked for: a whole name means that row alone."""
    names = {*rows.ROWS, *peers.GGML_TYPES}
    return not only or any(word == name or (word not in names and word in name) for word in only)


def quantized(model: language.LanguageModel, config: Any, row: rows.Row, statistics: Any) -> Any:
    """The model in one row's format."""
    if row.search:
        config = dataclasses.replace(config, range=jq.MinMSE())
    rules = [jq.Rule("embedding", None), *language.rules(config)[1:]]
    tree = jq.tree.quantize(quantized_head(model), rules, method=row.method, statistics=statistics)
    return jax.block_until_ready(tree)


def _layer_by_layer(
    model: language.LanguageModel, config: jq.ArrayConfig, row: rows.Row, batches: Sequence[Any]
) -> Any:
    """The model whose layers are quantized with the activations of those quantized before."""

    def block(weights: Any, x: jax.Array) -> jax.Array:
        return demo.decoder_layer(weights, model.config, model.params["frequencies"], x)

    embedded = [jq.take(model.params["embedding"], tokens, axis=0) for tokens in batches]
    layers = jq.tuning.sequential(
        block,
        model.params["layers"][0],
        embedded,
        [jq.Rule("*/kernel", config, axis=-1)],
        method=row.method,
        progress=True,
    )
    return {**quantized_head(model), "layers": (layers,)}


def quantized_head(model: language.LanguageModel) -> Any:
    """The parameters with the embedding, which is also the head, in 8 bits, as in all rows."""
    return jq.tree.quantize(model.params, language.rules(jq.W8A16)[:1])


def _result(
    bits: str,
    bits_per_weight: float,
    name: str,
    text: str,
    seed: int,
    distance: language.Distance,
    seconds: float,
) -> Result:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = dataclasses.asdict(distance)
    return Result(
        bits, bits_per_weight, name, text, seed, **figures, seconds=seconds, peak_mib=peak
    )


def table(found: Sequence[Result]) -> rich.table.Table:
    """Mean and half range over seeds and texts, by bits and method."""
    out = rich.table.Table(title="SmolLM2-135M, dithered: kernels quantized, embedding in 8 bits")
    for name in ("bits", "method", "mean KL", "of nearest", "top-1", "perplexity", "seconds"):
        out.add_column(name, justify="left" if name == "method" else "right")
    for bits in dict.fromkeys(r.bits for r in found):
        of_bits = [r for r in found if r.bits == bits]
        first = np.mean([r.divergence for r in of_bits if r.name == "nearest"] or [np.nan])
        for name in dict.fromkeys(r.name for r in of_bits):
            group = [r for r in of_bits if r.name == name]
            divergences = [r.divergence for r in group]
            half = (max(divergences) - min(divergences)) / 2
            mean = np.mean(divergences)
            out.add_row(
                f"{group[0].bits_per_weight:.2f}",
                name,
                f"{mean:.4f}" + (f" ± {half:.4f}" if len(group) > 1 else ""),
                f"{mean / first:.2f}",
                f"{np.mean([r.agreement for r in group]):.3f}",
                f"{np.mean([r.perplexity for r in group]):.2f}",
                f"{np.mean([r.seconds for r in group]):.0f}",
            )
        out.add_section()
    return out
