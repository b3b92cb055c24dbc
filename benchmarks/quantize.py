"""Measures time and memory of quantizing weights, compared with Keras, Qwix and plain passes.

    python -m benchmarks --suite quantize [--gibibytes 1] [--side 4096] [--only W8A8 Qwix]

The weights are square float32 matrices. Each contender runs in a separate process, alternating with
two plain passes over the same weights: a sum, which reads them, and a copy, which also writes them.
Peak memory belongs to the first call, including compilation: the growth of the process' largest
resident size (`ru_maxrss`) since before the weights were created, relative to the size of the
weights. The weights stay alive, so the minimum is 1 plus the result. Red: slower relative to the
copy, or more memory, than another library that does the same.
"""

import gc
import importlib
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import rich.table

from .products import bytes_of
from .quantizers import Quantizer, quantizers
from .timing import ratio

# Time limit of one process in seconds; at least three rounds run.
BUDGET = 15.0
# A difference below this is noise.
MARGIN = 1.05


def matrices(count: int, side: int) -> list[jax.Array]:
    """Gaussian weights, each created in place: temporary arrays would raise the peak."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        w = rng.standard_normal((side, side), dtype=np.float32)
        w /= math.sqrt(side)
        made.append(jnp.asarray(w))
    return jax.block_until_ready(made)


def measure(quantizer: Quantizer, count: int, side: int) -> dict[str, float]:
    """Seconds and memory to quantize `count` matrices."""
    if quantizer.library is not None:
        importlib.import_module(quantizer.library)
    jax.block_until_ready(jnp.zeros(1) + 1)  # JAX has started.
    before = _peak()
    weights = matrices(count, side)
    size = bytes_of(weights)
    ways = {
        "quantize": partial(quantizer.prepare, weights),
        "sum": lambda: lambda: [jax.jit(jnp.sum)(w).block_until_ready() for w in weights],
        "copy": lambda: lambda: [jnp.copy(w).block_until_ready() for w in weights],
    }
    first, result = _timed(ways["quantize"])
    peak = _peak() - before
    stored = bytes_of(result)
    del result
    once = sum(_timed(way)[0] for way in ways.values())
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(int(np.clip(BUDGET / once, 3, 20))):
        for name, way in ways.items():
            times[name].append(_timed(way)[0])
    return {
        "first_seconds": first,
        "seconds": statistics.median(times["quantize"]),
        "in_sums": ratio(times, "quantize", "sum"),
        "in_copies": ratio(times, "quantize", "copy"),
        "bits_per_weight": 32 * stored / size,
        "peak": peak / size,
        "weights_bytes": size,
    }


def _timed(way):
    """Seconds of the call that `way` prepares, and its result."""
    call = way()
    gc.collect()
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def _peak():
    """The largest resident size so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def in_a_process(name: str, count: int, side: int) -> dict[str, Any]:
    """`measure` in a process of its own, or the error with which that ends."""
    command = [sys.executable, "-m", "benchmarks.quantize", name, str(count), str(side)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"unsupported": done.stderr.strip()[-300:] or f"ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def table(title: str, results: list[dict[str, Any]], missing: list[str]) -> rich.table.Table:
    """One line per quantizer, those that do the same together."""
    header = ("result", "by", "seconds", "first call", "sum = 1", "copy = 1", "bits", "peak")
    found = rich.table.Table(title=title)
    for name in header:
        found.add_column(name, no_wrap=True)
    for r in results:
        if "unsupported" in r:
            found.add_row(r["family"], r["name"], *["failed"] * 6)
            continue
        others = [o for o in results if o["family"] == r["family"] and not o["is_ours"]]
        others = [o for o in others if "unsupported" not in o]
        found.add_row(
            r["family"],
            r["name"],
            f"{r['seconds']:.2f}",
            f"{r['first_seconds']:.2f}",
            f"{r['in_sums']:.1f}",
            _red(r, others, "in_copies", "{:.2f}"),
            f"{r['bits_per_weight']:.2f}",
            _red(r, others, "peak", "{:.2f}"),
        )
    for name in missing:
        found.add_row("", name, *["not installed"] * 6, style="dim")
    return found


def _red(result, others, key, form):
    """A figure of ours in red where another is better; those of others as they are."""
    text = form.format(result[key])
    is_lost = result["is_ours"] and any(result[key] > MARGIN * o[key] for o in others)
    return f"[red]{text}[/red]" if is_lost else text


def suite(arguments: Any) -> dict[str, Any]:
    """Runs the suite, prints its table, and returns what the JSON file holds."""
    found, missing = quantizers()
    only = arguments.only or [""]
    chosen = [q for q in found if any(word in q.name for word in only)]
    if not chosen:
        names = ", ".join(q.name for q in found)
        raise SystemExit(f"No contender has one of {only} in its name. There are {names}.")
    count = max(1, round(arguments.gibibytes * 2**28 / arguments.side**2))
    console = rich.console.Console(width=max(120, rich.console.Console().width))
    results = []
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(chosen))
        for q in chosen:
            bar.update(task, description=q.name)
            measured = in_a_process(q.name, count, arguments.side)
            results.append({"name": q.name, "family": q.family, "is_ours": q.is_ours, **measured})
            bar.advance(task)
    title = f"{count} float32 matrices of {arguments.side} x {arguments.side}, quantized"
    console.print(table(title, results, missing))
    console.print("Peak: first call, compilation included; weights = 1, and they stay alive.")
    return {"quantized": results, "not_installed": missing}


def main(name: str, count: str, side: str) -> None:
    """Measures one quantizer and prints the figures as JSON."""
    found = {q.name: q for q in quantizers()[0]}
    print(json.dumps(measure(found[name], int(count), int(side))))


if __name__ == "__main__":
    main(*sys.argv[1:])
