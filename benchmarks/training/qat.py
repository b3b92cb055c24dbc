"""The loss increase of post-training quantization (PTQ), and the share that QAT recovers.

All results of a row took the same number of steps from the same start: the float32 model is
fine-tuned for as many steps as the QAT ones, and PTQ quantizes its weights. Losses are those of the
converted tree.
"""

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import optax
import rich.table

import jaxquant as jq
from jaxquant import training

from .loop import (
    DECAY,
    FINE_TUNING_RATE,
    Result,
    Setting,
    adamw,
    held_out_loss,
    make_step,
    schedule,
    spread,
    train,
)

_INT4 = jq.ArrayConfig(format=jq.INT4)
SCHEMES = {
    "W8A8": jq.W8A8,
    "W4A16 g32": jq.Scheme(jq.ArrayConfig(format=jq.INT4, group_size=32)),
    "W4A4": jq.Scheme(_INT4, _INT4),
    # The output of a GELU has mostly one sign: half of the codes of a symmetric row are unused.
    "W4A4 asymmetric": jq.Scheme(_INT4, dataclasses.replace(_INT4, symmetric=False)),
    "INT2 g32": jq.Scheme(jq.ArrayConfig(format=jq.INT2, group_size=32)),
}
FLOAT, PTQ, PTQ_MSE = "float32", "PTQ", "PTQ, MinMSE"
STE, LSQ = "QAT, STE", "QAT, LSQ"
# Share of the loss increase that QAT must recover, and the smallest increase that counts.
GOAL, LEAST = 0.7, 0.02
# Float32, and two for each scheme.
FITS = 1 + 2 * len(SCHEMES)
# Learned steps are a hundredth of the weights in size, and Adam moves both by the rate.
STEP_RATE = 0.1


def is_learned(path: Sequence[Any]) -> bool:
    """Whether a path leads to a learned step or range."""
    return any(getattr(key, "name", None) == "learned" for key in path)


def optimizer_for(
    params: Any, steps: int, peak: float = FINE_TUNING_RATE
) -> optax.GradientTransformation:
    """AdamW for weights; Adam at a lower rate, without decay, for learned steps."""
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: "step" if is_learned(path) else "weight", params
    )
    rate = schedule(peak, steps)
    return optax.partition(
        {
            "weight": optax.adamw(rate, weight_decay=DECAY),
            "step": optax.adam(lambda count: STEP_RATE * rate(count)),
        },
        labels,
    )


def least_squares(scheme: jq.Scheme) -> jq.Scheme:
    """The scheme with the least squared error as the range of its weights."""
    weights = dataclasses.replace(scheme.weights, range=jq.MinMSE())
    return dataclasses.replace(scheme, weights=weights)


def run(setting: Setting) -> list[Result]:
    """One result per scheme, method and seed, float32 included."""
    task, steps = setting.task, setting.fine_steps
    tuned = _fine_tune(setting, setting.pretrained, adamw(FINE_TUNING_RATE, steps))
    results = [_result(setting, "", FLOAT, s, p) for s, p in tuned.items()]
    for name, scheme in SCHEMES.items():
        rules = task.rules(scheme)
        ways = {PTQ: rules, PTQ_MSE: task.rules(least_squares(scheme))}
        for method, way in ways.items():
            quantized = {s: jq.tree.quantize(p, way) for s, p in tuned.items()}
            results += [_result(setting, name, method, s, p) for s, p in quantized.items()]
        learned = functools.partial(training.init_learned, rules=rules)
        for method, init in {STE: lambda p: None, LSQ: learned}.items():
            starts = {s: training.prepare(p, rules, init(p)) for s, p in setting.pretrained.items()}
            optimizer = optimizer_for(next(iter(starts.values())), steps)
            ends = _fine_tune(setting, starts, optimizer)
            converted = {s: training.convert(p) for s, p in ends.items()}
            results += [_result(setting, name, method, s, p) for s, p in converted.items()]
    return results


def _fine_tune(setting, starts, optimizer):
    """Parameters by seed; the step is compiled once."""
    step, task = make_step(setting.task, optimizer), setting.task
    return {
        seed: train(
            step, start, optimizer.init(start), task, setting.fine_steps, (seed, 1), setting.advance
        )[0]
        for seed, start in starts.items()
    }


def _result(setting, scheme, method, seed, params):
    loss = held_out_loss(setting.task, params)
    return {"scheme": scheme, "method": method, "seed": seed, "loss": loss}


def shares(results: list[Result], scheme: str, method: str) -> list[float]:
    """The share of PTQ's loss increase that a method recovers, for each seed."""
    exact, lost, found = (
        _losses(results, *of) for of in (("", FLOAT), (scheme, PTQ), (scheme, method))
    )
    return [(lost[s] - found[s]) / (lost[s] - exact[s]) for s in found]


def _losses(results, scheme, method):
    of = [r for r in results if (r["scheme"], r["method"]) == (scheme, method)]
    return {r["seed"]: r["loss"] for r in of}


def table(title: str, results: list[Result]) -> rich.table.Table:
    """One row per scheme and method. Red: a missed goal, or LSQ worse than STE."""
    found = rich.table.Table(title=title)
    for name in ("scheme", "method", "validation loss", "above float32", "recovered", "worst seed"):
        found.add_column(name, no_wrap=True)
    exact = _losses(results, "", FLOAT)
    found.add_row("", FLOAT, spread(list(exact.values())), "", "", "")
    for scheme, method in dict.fromkeys((r["scheme"], r["method"]) for r in results):
        if method == FLOAT:
            continue
        losses = _losses(results, scheme, method)
        above = [losses[s] - exact[s] for s in losses]
        cells = [spread(list(losses.values())), spread(above), *_recovered(results, scheme, method)]
        if _is_behind(results, scheme, method):
            cells[0] = f"[red]{cells[0]}[/red]"
        found.add_row(scheme, method, *cells, end_section=method == LSQ)
    return found


def _recovered(results, scheme, method):
    """Mean and worst share, or nothing if there is little to recover."""
    exact, lost = _losses(results, "", FLOAT), _losses(results, scheme, PTQ)
    if method == PTQ:
        return "", ""
    if statistics.fmean(lost[s] - exact[s] for s in lost) < LEAST:
        return "PTQ loses < 0.02", ""
    found = shares(results, scheme, method)
    color = "red" if statistics.fmean(found) < GOAL else ""
    texts = f"{100 * statistics.fmean(found):.0f} %", f"{100 * min(found):.0f} %"
    return tuple(f"[{color}]{text}[/{color}]" if color else text for text in texts)


def _is_behind(results, scheme, method):
    """Whether LSQ ends above STE."""
    means = [statistics.fmean(_losses(results, scheme, m).values()) for m in (STE, method)]
    return method == LSQ and means[1] > means[0]
