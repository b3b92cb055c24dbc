"""`python -m benchmarks --suite accuracy`: methods on a language model at equal bits."""

import argparse
import dataclasses
import json
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.table

from . import language, peers, rows
from .trees import Trees, bits_per_weight

_TEST = 16


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        bits: name of the config.
        bits_per_weight: of the kernels, in packed files; the embedding has 8 bits everywhere.
        name: of the method.
        divergence, agreement, perplexity: as for `language.Distance`.
        seconds: that quantizing took, compilation included, without what earlier rows share.
        peak_mib: most memory of the process so far.
        text: that it was tested on; it was calibrated on another.
        seed: of the windows.
    """

    bits: str
    bits_per_weight: float
    name: str
    divergence: float
    agreement: float
    perplexity: float
    seconds: float
    peak_mib: float
    text: str = ""
    seed: int = 0


def suite(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all rows, prints the table and returns the results."""
    console = rich.console.Console()
    model = language.load_model(channel_scales=arguments.channel_scales)
    texts = language.texts()
    found: list[Result] = []
    for seed in range(arguments.seeds):
        for name in list(texts)[: arguments.texts]:
            (other,) = (text for key, text in texts.items() if key != name)
            calibrating = language.windows(model, other, arguments.windows, seed)
            judge = language.Judge(model, language.windows(model, texts[name], _TEST, seed))
            trees = Trees(model, list(language.batches(calibrating)))
            for result in _results(trees, judge, arguments.bits, arguments.only):
                found.append(dataclasses.replace(result, text=name, seed=seed))
                console.print(found[-1])
                if arguments.json:  # A run that is cut off loses one row.
                    arguments.json.write_text(json.dumps(_as_json(found), indent=1))
            console.print(table(found))
    if arguments.picture:
        from .picture import plot

        plot(_as_json(found)["results"], arguments.picture)
    return _as_json(found)


def _as_json(found: Sequence[Result]) -> dict[str, Any]:
    return {"results": [dataclasses.asdict(r) for r in found]}


def _results(
    trees: Trees, judge: language.Judge, bits: Sequence[str] | None, only: Sequence[str] | None
) -> Iterator[Result]:
    """The rows of one seed and one pair of texts."""
    for peer in peers.installed():
        if _is_wanted(peer.name, only):
            statistics = trees.statistics  # Not timed.
            start = time.perf_counter()
            layers = peers.quantized(peer, trees.model.params["layers"][0], statistics)
            seconds = time.perf_counter() - start
            distance = judge.distance({**trees.with_head, "layers": (layers,)})
            yield _result(f"{peer.bits:.3g}", peer.bits, peer.name, distance, seconds)
    for config in bits or rows.CONFIGS:
        for name, row in rows.ROWS.items():
            if not (_is_wanted(name, only) and row.is_for(config)):
                continue
            start = time.perf_counter()
            tree = trees.quantized(config, name)
            seconds = time.perf_counter() - start
            count = bits_per_weight(tree["layers"])
            yield _result(config, count, name, judge.distance(tree), seconds)


def _is_wanted(name: str, only: Sequence[str] | None) -> bool:
    """Whether a row is among those asked for: a whole name means that row alone."""
    names = {*rows.ROWS, *(peer.name for peer in peers.PEERS)}
    return not only or any(word == name or (word not in names and word in name) for word in only)


def _result(
    bits: str, bits_per_weight: float, name: str, distance: language.Distance, seconds: float
) -> Result:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = dataclasses.asdict(distance)
    return Result(bits, bits_per_weight, name, **figures, seconds=seconds, peak_mib=peak)


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
