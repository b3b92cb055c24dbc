"""How fast products with quantized weights are on a GPU, beside XLA's bfloat16 and other libraries.

    python -m benchmarks --suite gpu [--full] [--shapes attention up] [--rows 1 16 64]

Needs a GPU. All contenders take turns in one run, by bfloat16 inputs. A turn is so many products in
one compiled program that a call's own time does not show, each by another copy of the weights, so
that they come from memory and not from a cache; each waits for the one before by an addition to its
inputs, which is counted for all. A cell has the speed in units of XLA's bfloat16, microseconds of a
product (the median), and the shares of what the GPU was measured to reach: of the bandwidth of a
sum over 4 GiB at which the weights were read, and of the rate of a product of bfloat16 matrices.
What is slower than bfloat16 is red, and so is what is wrong by more than 20 %; what is faster than
all others is bold. "W4A16, triton" and the like force a computation that is not chosen by itself. A
last table holds what was found against what is to be reached (`gpu_goals.py`).
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

import jaxquant as jq

from . import cpu, gpu_goals, machine, tables
from .alternatives import contenders
from .products import Contender
from .shapes import ROWS, WEIGHTS

REFERENCE = "XLA bfloat16"
SCHEMES = ("W8A8", "W8A16", "W4A16", "W4A8", "FP8", "NF4A16")
# Computations that are only run where they are asked for, until they were measured.
FORCED = (
    ("W8A8", "triton"),
    ("W4A16", "triton"),
    ("W4A8", "triton"),
    ("FP8", "triton"),
    ("FP8", "scaled"),
    ("W8A16", "scaled"),
)
IN_A_ROW = 16
# Long enough, half a millisecond and more, not to measure how a program is started.
PROBE = 2**32
LENGTH = 8192
# What a loan of half an hour allows; the rest by --full.
DEFAULT_SHAPES = ("up",)
DEFAULT_ROWS = (1, 16, 64, 4096)


def prepare() -> None:
    """Checks that there is a GPU.

    Raises:
        SystemExit: JAX sees none.
    """
    platform = jax.devices()[0].platform
    if platform != "gpu":
        raise SystemExit(
            f"The suite gpu needs a GPU that JAX sees; its devices are of platform {platform!r}. "
            "Install jax[cuda12] or jax[cuda13] on a machine that has one."
        )


def fields() -> tuple[list[Contender], list[str]]:
    """Contenders, and the names of what is not installed."""
    found, missing = contenders({name: jq.SCHEMES[name] for name in SCHEMES}, "gpu")
    here = [c for c in found if c.is_jax]
    by_name = {c.name: c for c in here}
    return here + [forced(by_name[name], how) for name, how in FORCED], missing


def forced(contender: Contender, implementation: str) -> Contender:
    """One of ours, computed as it is told."""
    run = partial(jq.matmul, implementation=implementation)
    return dataclasses.replace(contender, name=f"{contender.name}, {implementation}", run=run)


def measure_shape(
    found: Sequence[Contender],
    name: str,
    shape: tuple[int, int],
    rows: Sequence[int],
    peaks: dict[str, float],
) -> list[dict[str, Any]]:
    """Lines of results, one per contender and number of rows."""
    weights, results = cpu.prepare_all(found, shape, False, "bfloat16"), []
    for m in rows:
        x = jnp.asarray(np.random.default_rng(1).normal(size=(m, shape[0])), jnp.bfloat16)
        lines = cpu.measure(
            found, weights, x, peaks, reference=REFERENCE, count=IN_A_ROW, probe=PROBE
        )
        about = {"shape": name, "K": shape[0], "N": shape[1], "rows": m, "dtype": "bfloat16"}
        about |= {"column": f"M={m}", "in_cache": False}
        results += [
            _of_one_product(line) | about | _explained(c, x, weights[c.name], line)
            for c, line in zip(found, lines, strict=True)
        ]
    return results


def _explained(contender, x, weights, line):
    """What `explain` warns of in a product of ours that ran."""
    if "refusal" in line or not contender.is_ours:
        return {}
    warnings = [row.warning for row in jq.explain(contender.run, x, weights[0])]
    return {"warning": "; ".join(w for w in warnings if w is not None) or None}


def _of_one_product(line):
    """The line with the time of one of the products of a turn."""
    if "refusal" in line:
        return line
    microseconds = 1e3 * line["milliseconds"] / IN_A_ROW
    shares = line["share_of_bandwidth"], line["share_of_operations"]
    note = " · ".join([f"{microseconds:.1f} µs", *(f"{100 * share:.0f} %" for share in shares)])
    return {**line, "microseconds": microseconds, "note": note}


def suite(arguments: Any) -> dict[str, Any]:
    """Runs the suite, prints its tables, and returns what the JSON file holds."""
    shapes = arguments.shapes or (WEIGHTS if arguments.full else DEFAULT_SHAPES)
    rows = arguments.rows or ((*ROWS, 4096) if arguments.full else DEFAULT_ROWS)
    found, missing = fields()
    rate = machine.multiplication(LENGTH, dtype="bfloat16")
    peaks = {"bytes_per_second": machine.bandwidth(PROBE), "operations_per_second": rate}
    console = rich.console.Console(width=max(140, rich.console.Console().width))
    console.print(
        f"A sum reads {peaks['bytes_per_second'] / 1e9:.0f} GB/s, and a product of bfloat16 "
        f"matrices computes {rate / 1e12:.1f} T operations/s."
    )
    results = []
    for name in rich.progress.track(shapes, console=rich.console.Console(stderr=True)):
        part = measure_shape(found, name, WEIGHTS[name], rows, peaks)
        title = f"{name} {WEIGHTS[name]}, bfloat16 inputs: speed · time · bandwidth · matrix rate"
        console.print(tables.speeds(title, part, missing, REFERENCE))
        for line in tables.refusals(part):
            console.print(f"Refused by {line}", markup=False)
        results += part
    goals = gpu_goals.outcomes(results)
    console.print(gpu_goals.table(goals))
    return {**peaks, "not_installed": missing, "products": results, "goals": goals}
