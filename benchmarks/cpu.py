"""Compares matrix multiplication with quantized weights with XLA's float32 and other libraries.

    python -m benchmarks --suite cpu [--shapes attention odd] [--rows 1 8] [--dtype bfloat16]

All contenders alternate in one run. With few rows a turn is four multiplications in sequence, in
one compiled program if the contender is JAX, like consecutive layers of a model. In the first table
each multiplication reads another copy of the weights, so that none stays in the last-level cache;
in the second all read the same copy. Each cell has the speed relative to XLA's float32 (above 1 is
faster) and the share of the memory bandwidth at which weights were read: 100 % is a sum over 256
MiB that alternates with the contenders. Red: slower than float32, or wrong by more than 20 %. Bold:
the fastest.
"""

import itertools
import math
import statistics
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

from . import machine, tables
from .alternatives import contenders
from .products import Contender
from .shapes import ROWS, WEIGHTS
from .timing import by_turns, ratio

REFERENCE = "XLA float32"
# Of the weights, by default.
SHAPES = ("attention", "up", "down", "small", "encoder", "odd")
# Larger than the last-level cache of any desktop machine.
OUT_OF_CACHE = 192 * 2**20
# Other runtimes create one session per copy, which must not take minutes.
MOST_COPIES = 128
# Time limit of one cell, in seconds.
BUDGET = 12.0
# Multiplications per turn up to so many rows; with more rows one takes long enough.
IN_A_ROW, FEW_ROWS = 4, 32
SUM = "a sum"
# Bytes that the sum reads.
PROBE = 2**28


def prepared(
    contender: Contender, shape: tuple[int, int], copies_of: int, dtype: str = "float32"
) -> list[Any]:
    """Copies of the weights of at least `copies_of` bytes together, at most `MOST_COPIES`."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=shape) / math.sqrt(shape[0]), dtype)
    first = jax.block_until_ready(contender.prepare(w))
    count = min(max(1, -(-copies_of // contender.size(first))), MOST_COPIES)
    return [first] + [contender.copy(first) for _ in range(count - 1)]


def rotating(contender: Contender, x: jax.Array, weights: list[Any], count: int = 1):
    """A call of `count` multiplications in sequence, each with the next copy of the weights."""
    turn = itertools.cycle(weights)
    x = contender.place(x if contender.dtype is None else x.astype(contender.dtype))
    if contender.is_jax:
        run = jax.jit(partial(_in_a_row, contender.run))
        return lambda: run(x, [next(turn) for _ in range(count)])
    run = contender.compile(contender.run)
    return lambda: [run(x, next(turn)) for _ in range(count)][-1]


def _in_a_row(run, x, weights):
    """The last of several multiplications, each of which depends on the previous one."""
    out = run(x, weights[0])
    for w in weights[1:]:
        x = x + (1e-30 * out[..., :1]).astype(x.dtype)
        out = run(x, w)
    return out


def prepare_all(found, shape, in_cache, dtype="float32") -> dict[str, list[Any] | str]:
    """Copies of the weights for each contender, or the error that it raises."""
    size = 0 if in_cache else OUT_OF_CACHE
    return {c.name: _attempt(partial(prepared, c, shape, size, dtype)) for c in found}


def _attempt(work):
    """The result of `work`, or its error as text."""
    try:
        return work()
    except Exception as error:  # Other libraries raise what they like.
        return f"{type(error).__name__}: {error}"[:300]


def measure(
    found, weights, x, peaks, *, reference=REFERENCE, count=None, probe=None
) -> list[dict[str, Any]]:
    """One line of results per contender.

    Args:
        found: contenders, including the reference.
        weights: those of each contender, from `prepare_all`.
        x: activations, (M, K).
        peaks: operations per second that the machine achieves.
        reference: contender whose speed is 1.
        count: multiplications per turn; None for the default on CPU.
        probe: bytes that the sum reads; None for the default on CPU.
    """
    if count is None:
        count = IN_A_ROW if len(x) <= FEW_ROWS else 1
    calls, lines = {}, {c.name: {"contender": c.name, "is_ours": c.is_ours} for c in found}
    for c in found:
        copies = weights[c.name]
        call = (
            copies if isinstance(copies, str) else _attempt(partial(_started, c, x, copies, count))
        )
        if isinstance(call, str):
            lines[c.name]["unsupported"] = call
        else:
            calls[c.name] = call
            lines[c.name]["bytes"] = c.size(copies[0])
    calls[SUM], size = machine.summation(probe or PROBE)
    times = by_turns(calls, _rounds(calls))
    peaks = {**peaks, "bytes_per_second": size / statistics.median(times[SUM])}
    del calls[SUM]
    wanted = np.asarray(calls[reference](), np.float64)
    work = 2 * x.size * wanted.shape[-1] * count
    for name, call in calls.items():
        error = np.linalg.norm(np.asarray(call(), np.float64) - wanted) / np.linalg.norm(wanted)
        lines[name] |= _figures(times, name, lines[name]["bytes"] * count, work, peaks, reference)
        lines[name]["error"] = float(error)
    return list(lines.values())


def _started(contender, x, weights, count):
    """The call of a contender, after one run."""
    call = rotating(contender, x, weights, count)
    jax.block_until_ready(call())
    return call


def _rounds(calls):
    """As many rounds as the budget allows."""
    once = sum(sum(t) for t in by_turns(calls, rounds=1).values())
    return int(np.clip(BUDGET / once, 3, 50))


def _figures(times, name, size, operations, peaks, reference):
    """Figures derived from the times of one contender."""
    seconds = statistics.median(times[name])
    quarter, _, three = statistics.quantiles(times[name], n=4)
    share = size / seconds / peaks["bytes_per_second"]
    return {
        "speed": 1 / ratio(times, name, reference),
        "milliseconds": 1e3 * seconds,
        "spread": (three - quarter) / seconds,
        "operations": operations,
        "share_of_bandwidth": share,
        "share_of_operations": operations / seconds / peaks["operations_per_second"],
        "note": f"{100 * share:.0f} %",
    }


def suite(arguments: Any) -> dict[str, Any]:
    """Runs the suite, prints its tables, and returns what the JSON file holds."""
    found, missing = contenders()
    peaks = machine.peaks()
    console = rich.console.Console(width=max(100, rich.console.Console().width))
    console.print(
        f"A sum reads {peaks['bytes_per_second'] / 1e9:.1f} GB/s; float32 matrix multiplication "
        f"runs {peaks['operations_per_second'] / 1e9:.0f} G operations/s."
    )
    cells = list(itertools.product((False, True), arguments.shapes or SHAPES))
    rows = arguments.rows or ROWS
    results = []
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(cells) * len(rows))
        for in_cache, name in cells:
            bar.update(task, description=f"{name}, weights")
            shape, part = WEIGHTS[name], []
            weights = prepare_all(found, shape, in_cache)
            about = {"K": shape[0], "N": shape[1], "dtype": arguments.dtype, "in_cache": in_cache}
            for m in rows:
                bar.update(task, description=f"{name}, {m} rows")
                x = np.random.default_rng(1).normal(size=(m, shape[0]))
                lines = measure(found, weights, jnp.asarray(x, arguments.dtype), peaks)
                part += [{**line, **about, "rows": m, "column": f"M={m}"} for line in lines]
                bar.advance(task)
            where = "in cache" if in_cache else "out of cache"
            title = f"{name} {WEIGHTS[name]}, {arguments.dtype}, {where}"
            console.print(tables.speeds(title, part, missing))
            for line in tables.unsupported(part):
                console.print(f"Not supported by {line}")
            results += part
    return {**peaks, "not_installed": missing, "products": results}
