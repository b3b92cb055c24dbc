"""How fast products with quantized weights are, beside XLA's float32 and other libraries.

    python -m benchmarks --suite cpu [--shapes attention odd] [--rows 1 8] [--dtype bfloat16]

All contenders take turns in one run. In the first table each reads another copy of its weights at
every call, so that none stays in the last-level cache; in the second always the same. A number is
the speed in units of XLA's float32, over 1 is faster, and the share of the machine's bandwidth at
which the weights were read, as a sum over an array reaches it in the same run. What is slower than
float32 is red; what is faster than all others is bold.
"""

import itertools
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import rich.table

from jaxquant.core import packed_bytes

from . import machine
from .products import Contender, contenders
from .shapes import ROWS, WEIGHTS
from .timing import by_turns, ratio

REFERENCE = "XLA float32"
# More than the last-level cache of any desktop machine holds.
OUT_OF_CACHE = 192 * 2**20
# Seconds that all calls of one cell may take.
BUDGET = 4.0


def prepared(contender: Contender, shape: tuple[int, int], copies_of: int) -> list[Any]:
    """Copies of the weights that together take `copies_of` bytes at least."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=shape) / math.sqrt(shape[0]), jnp.float32)
    first = jax.block_until_ready(contender.prepare(w))
    count = max(1, -(-copies_of // bytes_of(first)))
    return [first] + [jax.tree.map(jnp.copy, first) for _ in range(count - 1)]


def bytes_of(weights: Any) -> int:
    """Bytes in device memory."""
    return sum(packed_bytes(x) for x in jax.tree.leaves(weights))


def rotating(contender: Contender, x: jax.Array, weights: list[Any]):
    """A call that takes the next copy of the weights each time."""
    run, turn = jax.jit(contender.run), itertools.cycle(weights)
    x = x if contender.dtype is None else x.astype(contender.dtype)
    return lambda: run(x, next(turn))


def measure(shape, rows, dtype, in_cache, found, peak) -> list[dict[str, Any]]:
    """One row of results per contender."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, shape[0])), dtype)
    weights = {c.name: prepared(c, shape, 0 if in_cache else OUT_OF_CACHE) for c in found}
    calls = {c.name: rotating(c, x, weights[c.name]) for c in found}
    once = sum(sum(t) for t in by_turns(calls, rounds=1).values())
    times = by_turns(calls, rounds=int(np.clip(BUDGET / once, 3, 50)))
    wanted = np.asarray(calls[REFERENCE](), np.float64)
    results = []
    for c in found:
        size, seconds = bytes_of(weights[c.name][0]), statistics.median(times[c.name])
        quarter, _, three = statistics.quantiles(times[c.name], n=4)
        error = np.linalg.norm(np.asarray(calls[c.name](), np.float64) - wanted)
        results.append(
            {
                "contender": c.name,
                "is_ours": c.is_ours,
                "K": shape[0],
                "N": shape[1],
                "rows": rows,
                "dtype": dtype,
                "in_cache": in_cache,
                "speed": 1 / ratio(times, c.name, REFERENCE),
                "milliseconds": 1e3 * seconds,
                "spread": (three - quarter) / seconds,
                "bytes": size,
                "operations": 2 * rows * math.prod(shape),
                "share_of_bandwidth": size / seconds / peak,
                "error": float(error / np.linalg.norm(wanted)),
            }
        )
    return results


def table(title: str, results: list[dict[str, Any]]) -> rich.table.Table:
    """One line per contender, one column per number of rows."""
    rows = sorted({r["rows"] for r in results})
    found = rich.table.Table("by", *(f"M={m}" for m in rows), title=title)
    best = {m: max(r["speed"] for r in results if r["rows"] == m) for m in rows}
    for name in dict.fromkeys(r["contender"] for r in results):
        cells = {r["rows"]: r for r in results if r["contender"] == name}
        found.add_row(name, *(_cell(cells[m], best[m]) for m in rows))
    return found


def _cell(result, best):
    text = f"{result['speed']:.2f} · {100 * result['share_of_bandwidth']:.0f} %"
    if result["speed"] < 1 and result["contender"] != REFERENCE:
        return f"[red]{text}[/red]"
    return f"[bold]{text}[/bold]" if result["speed"] == best else text


def suite(arguments: Any) -> dict[str, Any]:
    """Runs the suite, prints its tables, and returns what the JSON file holds."""
    found, missing = contenders()
    peak = machine.bandwidth()
    console = rich.console.Console(width=max(100, rich.console.Console().width))
    console.print(f"A sum reads {peak / 1e9:.1f} GB/s. Not installed: {', '.join(missing) or '-'}.")
    cells = list(itertools.product((False, True), arguments.shapes or WEIGHTS))
    rows = arguments.rows or ROWS
    results = []
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(cells) * len(rows))
        for in_cache, name in cells:
            part = []
            for m in rows:
                bar.update(task, description=f"{name}, {m} rows")
                part += measure(WEIGHTS[name], m, arguments.dtype, in_cache, found, peak)
                bar.advance(task)
            where = "in cache" if in_cache else "out of cache"
            console.print(table(f"{name} {WEIGHTS[name]}, {arguments.dtype}, {where}", part))
            results += part
    return {"bytes_per_second": peak, "not_installed": missing, "products": results}
