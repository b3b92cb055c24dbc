"""Compares matrix multiplication with quantized weights on a GPU with bfloat16 and other libraries.

    python -m benchmarks --suite gpu [--full] [--shapes attention up] [--rows 1 16 64]

Needs a GPU. All contenders alternate in one run, with bfloat16 activations. A turn is one compiled
program with enough multiplications to hide the launch time. Each reads another copy of the weights,
so that weights come from memory and not from a cache, and depends on the previous one through an
addition to its activations, which is counted for every contender. Each cell has the speed relative
to XLA's bfloat16, the median microseconds of one multiplication, and two shares of what the GPU was
measured to achieve: of the bandwidth of a sum over 4 GiB, and of the rate of bfloat16 matrix
multiplication. Red: slower than bfloat16, or wrong by more than 20 %. Bold: the fastest. "W4A16,
triton" and the like force a computation that is not selected by default. A last table compares the
results with the targets (`gpu_goals.py`).
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
# Computations that stay opt-in until they have been measured.
FORCED = (
    ("W8A8", "triton"),
    ("W4A16", "triton"),
    ("W4A8", "triton"),
    ("FP8", "triton"),
    ("FP8", "scaled"),
    ("W8A16", "scaled"),
)
IN_A_ROW = 16
# At least half a millisecond, so that the launch time of a program does not show.
PROBE = 2**32
LENGTH = 8192
# Fits in half an hour; the rest needs --full.
DEFAULT_SHAPES = ("up",)
DEFAULT_ROWS = (1, 16, 64, 4096)


def prepare() -> None:
    """Checks that there is a GPU.

    Raises:
        SystemExit: JAX does not find one.
    """
    platform = jax.devices()[0].platform
    if platform != "gpu":
        raise SystemExit(
            f"The suite gpu needs a GPU that JAX can use; got devices of platform {platform!r}. "
            "Install jax[cuda12] or jax[cuda13] on a machine with a GPU."
        )


def fields() -> tuple[list[Contender], list[str]]:
    """Contenders, and the names of those not installed."""
    found, missing = contenders({name: jq.SCHEMES[name] for name in SCHEMES}, "gpu")
    here = [c for c in found if c.is_jax]
    by_name = {c.name: c for c in here}
    return here + [forced(by_name[name], how) for name, how in FORCED], missing


def forced(contender: Contender, implementation: str) -> Contender:
    """One of ours with a forced implementation."""
    run = partial(jq.matmul, implementation=implementation)
    return dataclasses.replace(contender, name=f"{contender.name}, {implementation}", run=run)


def measure_shape(
    found: Sequence[Contender],
    name: str,
    shape: tuple[int, int],
    rows: Sequence[int],
    peaks: dict[str, float],
) -> list[dict[str, Any]]:
    """Results, one line per contender and number of rows."""
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
    """The warnings of `explain` for one of our contenders that ran."""
    if "unsupported" in line or not contender.is_ours:
        return {}
    warnings = [row.warning for row in jq.explain(contender.run, x, weights[0])]
    return {"warning": "; ".join(w for w in warnings if w is not None) or None}


def _of_one_product(line):
    """The line with the time of a single multiplication."""
    if "unsupported" in line:
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
        f"A sum reads {peaks['bytes_per_second'] / 1e9:.0f} GB/s; bfloat16 matrix multiplication "
        f"runs {rate / 1e12:.1f} T operations/s."
    )
    results = []
    for name in rich.progress.track(shapes, console=rich.console.Console(stderr=True)):
        part = measure_shape(found, name, WEIGHTS[name], rows, peaks)
        title = (
            f"{name} {WEIGHTS[name]}, bfloat16 activations: speed · time · bandwidth · matrix rate"
        )
        console.print(tables.speeds(title, part, missing, REFERENCE))
        for line in tables.unsupported(part):
            console.print(f"Not supported by {line}", markup=False)
        results += part
    goals = gpu_goals.outcomes(results)
    console.print(gpu_goals.table(goals))
    return {**peaks, "not_installed": missing, "products": results, "goals": goals}
