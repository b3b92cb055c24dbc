"""Products of random sizes and schemes: is the fastest computation chosen, and predicted?

    python -m benchmarks --suite random [--count 2000] [--seed 0]

Rows, lengths and columns are drawn on a logarithmic scale, so that most of them are not round, and
schemes at random. Each product runs beside XLA's float32 and beside the computation of XLA that
would run without the native kernels; weights come from memory, as in a model. Two questions:

- where the product has less than 0.9 of the speed of the better of both, does `jq.explain` warn?
- where it is more than 15 % faster or slower than float32, does `jq.explain` say which?

Where `explain` was wrong, the product is timed twice more, because other programs may have slowed
it down. The median of the three speeds counts.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import rich.table

import jaxquant as jq

from .cpu import OUT_OF_CACHE, prepared, rotating
from .products import Contender, of_xla, ours
from .timing import by_turns, ratio

LENGTHS, ROWS = (64, 8192), (1, 2048)
FORMATS = {f.name: f for f in (jq.INT8, jq.INT4, jq.NF4, jq.MXFP4, jq.NVFP4)}
GROUPS = (16, 32, 64, 96, 128, 192, 256)
ROUNDS = 11
# Less than this of the best speed is slow; nearer to 1 than this is neither faster nor slower.
SLOW, BAND = 0.9, 0.15
# Computations of XLA, in the order in which they are tried without the kernels.
BY_XLA = ("integer", "blocks", "dequantize")


@dataclasses.dataclass(frozen=True)
class Case:
    """One product: (rows, length) by (length, columns)."""

    rows: int
    length: int
    columns: int
    scheme: jq.Scheme

    def __str__(self) -> str:
        weights = self.scheme.weights
        group = weights.group_size or weights.format.group_size
        words = [weights.format.name, f"g{group}" if group else ""]
        words += ["" if weights.symmetric else "asymmetric"]
        name = " ".join(filter(None, words))
        inputs = "float" if self.scheme.inputs is None else "int8"
        return f"{self.rows} x {self.length} x {self.columns} {name} by {inputs}"


def drawn(count: int, seed: int) -> list[Case]:
    """Random products, the same for the same seed."""
    rng = np.random.default_rng(seed)

    def size(low: int, high: int) -> int:
        return round(math.exp(rng.uniform(math.log(low), math.log(high))))

    cases = []
    for _ in range(count):
        format = FORMATS[rng.choice(list(FORMATS))]
        is_integer = format.rounds and format.codebook is None
        group = format.group_size or rng.choice([0, *GROUPS])
        weights = jq.ArrayConfig(
            format=format,
            group_size=None if format.group_size or not group else int(group),
            symmetric=not (is_integer and rng.random() < 0.25),
        )
        inputs = jq.ArrayConfig() if is_integer and rng.random() < 0.5 else None
        multiple = max(int(group), 1)
        length = max(multiple, size(*LENGTHS) // multiple * multiple)
        cases.append(Case(size(*ROWS), length, size(*LENGTHS), jq.Scheme(weights, inputs)))
    return cases


def measured(case: Case, rounds: int = ROUNDS) -> dict[str, Any]:
    """Speeds of one product relative to float32, and what `jq.explain` says about it."""
    own = ours("ours", case.scheme)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(case.rows, case.length)), jnp.float32)
    contenders = {"float32": of_xla("float32"), "ours": own}
    (row,) = jq.explain(jq.matmul, x, _abstract(own, case)).rows
    if row.implementation not in BY_XLA:
        name = _xla_for(own, case, x)
        run = partial(jq.matmul, implementation=name)
        contenders[name] = dataclasses.replace(own, name=name, run=run)
    calls = {}
    for name, contender in contenders.items():
        weights = prepared(contender, (case.length, case.columns), OUT_OF_CACHE // 2)
        calls[name] = rotating(contender, x, weights)
    times = by_turns(calls, rounds)
    speeds = {name: 1 / ratio(times, name, "float32") for name in contenders}
    speed = speeds.pop("ours")
    return {
        "case": str(case),
        "rows": case.rows,
        "length": case.length,
        "columns": case.columns,
        "implementation": row.implementation,
        "speed": speed,
        "of_best": speed / max(speeds.values()),
        "alternative": max(speeds, key=lambda name: speeds[name]),
        "predicted": predicted(row),
        "warning": row.warning,
    }


def settled(case: Case) -> dict[str, Any]:
    """`measured`, three times if `jq.explain` did not say how slow the product is."""
    found = measured(case)
    if not (_is_slow_unwarned(found) or _is_told_wrongly(found)):
        return found
    return sorted([found, measured(case), measured(case)], key=lambda r: r["speed"])[1]


def _is_slow_unwarned(result: dict[str, Any]) -> bool:
    return result["of_best"] < SLOW and result["warning"] is None


def _is_told_wrongly(result: dict[str, Any]) -> bool:
    return abs(result["speed"] - 1) > BAND and not is_told(result)


def _abstract(contender: Contender, case: Case) -> Any:
    like = jax.ShapeDtypeStruct((case.length, case.columns), jnp.float32)
    return jax.eval_shape(contender.prepare, like)


def _xla_for(contender: Contender, case: Case, x: jax.Array) -> str:
    """The first computation of XLA that supports the product."""
    weights = _abstract(contender, case)
    for name in BY_XLA[:-1]:
        try:
            jax.eval_shape(partial(jq.matmul, implementation=name), x, weights)
            return name
        except ValueError:
            continue
    return BY_XLA[-1]


def predicted(row: Any) -> float | None:
    """The speed that a row of `jq.explain` predicts; of several measured nearby, their mean."""
    found = [speed for *_, speed in row.speeds]
    return math.exp(np.mean(np.log(found))) if found else row.estimate


def is_told(result: dict[str, Any]) -> bool:
    """Whether explain says rightly that the product is faster, or slower, than float32."""
    guess = result["predicted"]
    return guess is not None and (guess > 1) == (result["speed"] > 1)


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of what the suite asks."""
    slow = [r for r in results if r["of_best"] < SLOW]
    clear = [r for r in results if not 1 - BAND <= r["speed"] <= 1 + BAND]
    return {
        "products": len(results),
        "slow": len(slow),
        "slow_without_warning": sum(map(_is_slow_unwarned, results)),
        "warned": sum(r["warning"] is not None for r in results),
        "clear": len(clear),
        "told": sum(map(is_told, clear)),
        "median_speed": float(np.median([r["speed"] for r in results])),
    }


def in_words(counts: dict[str, Any]) -> str:
    """A summary as text."""
    return (
        f"{counts['slow']} of {counts['products']} products had less than {SLOW} of the speed of "
        "the better of float32 and XLA's own computation, "
        f"{counts['slow_without_warning']} of them "
        f"without a warning by `jq.explain`. {counts['clear']} products were more than {BAND:.0%} "
        f"faster or slower than float32; for {counts['told']} of them, it predicted which."
    )


def losing(results: list[dict[str, Any]]) -> list[str]:
    """Lines of a table of the slow products."""
    lines = ["| computed by | warned of | products | of the best |", "|---|---|---|---|"]
    slow = [r for r in results if r["of_best"] < SLOW]

    def kind(r: dict[str, Any]) -> tuple[str, str]:
        rows = r["case"].rpartition(" by ")[2]
        return f"{r['implementation']}, {rows} rows", "no" if r["warning"] is None else "yes"

    for found in sorted(set(map(kind, slow))):
        speeds = [r["of_best"] for r in slow if kind(r) == found]
        cells = *found, str(len(speeds)), f"{min(speeds):.2f} to {max(speeds):.2f}"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def suite(arguments: Any) -> dict[str, Any]:
    """Runs the suite, prints what it found, and returns what the JSON file holds."""
    console = rich.console.Console(width=max(120, rich.console.Console().width))
    results = []
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as bar:
        task = bar.add_task("Products", total=arguments.count)
        for case in drawn(arguments.count, arguments.seed):
            results.append(settled(case))
            bar.advance(task)
    found = summary(results)
    console.print(in_words(found))
    print(*losing(results), sep="\n")
    slow, wrong = (list(filter(of, results)) for of in (_is_slow_unwarned, _is_told_wrongly))
    console.print(_table("Slow without a warning", slow))
    console.print(_table("Predicted wrongly, or not at all", wrong))
    return {"summary": found, "products": results}


def _table(title: str, results: list[dict[str, Any]]) -> rich.table.Table:
    table = rich.table.Table("product", "by", "speed", "of best", "explain", "than", title=title)
    for r in sorted(results, key=lambda r: r["of_best"]):
        guess = "unknown" if r["predicted"] is None else f"{r['predicted']:.2f}"
        cells = f"{r['speed']:.2f}", f"{r['of_best']:.2f}", guess, r["alternative"]
        table.add_row(r["case"], r["implementation"], *cells)
    return table
