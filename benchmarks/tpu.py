"""Estimates by the TPU compiler for matrix multiplication with quantized weights.

    python -m benchmarks --suite tpu-compile [--chips v5e v6e] [--shapes attention] [--rows 8 2048]
        [--only W4A16 Qwix]

Needs libtpu (extra `tpu`) but no TPU: nothing runs. Everything is compiled for bfloat16
activations, and every figure is an ESTIMATE by the compiler, not a measurement. Each cell has
microseconds, those of the roofline in brackets (bytes over bandwidth or operations over rate,
whichever takes longer), and MB through HBM plus MB of temporaries. Red: more than 5 % behind
bfloat16. Bold: the fastest. `count` marks a Pallas kernel, for which the compiler has no estimate:
its bytes and operations are counted. `>` marks a loop that is counted once because its trip count
is unknown.
"""

import functools
import itertools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.progress
import rich.table

import jaxquant as jq
from jaxquant.core import packed_bytes

from .alternatives import contenders
from .products import Contender, once_quantized, threefold
from .shapes import ROWS, WEIGHTS
from .tpu_compiler import CHIPS, compile_for, estimate

REFERENCE = "XLA bfloat16"
SCHEMES = ("W8A8", "W8A16", "W4A16", "W4A8", "FP8", "NF4A16", "MXFP8A8", "MXFP4A16", "NVFP4A16")
# Fits in a quarter of an hour on two cores.
DEFAULT_CHIPS = ("v5e", "v6e")
DEFAULT_SHAPES = ("attention",)
DEFAULT_ROWS = (8, 128, 2048)


def fields(only: list[str] | None = None) -> tuple[list[list[Contender]], list[str]]:
    """Contenders, with one matrix and with three, and the names of those not installed.

    Args:
        only: keep contenders whose name contains one of these words; None for all.
    """
    found, missing = contenders({name: jq.SCHEMES[name] for name in SCHEMES}, "tpu")
    single = [c for c in found if c.is_jax and (c.name == REFERENCE or c.dtype is None)]
    alone = {c.name: c for c in single}
    several = [threefold(alone[n]) for n in (REFERENCE, "Qwix w8a8", "W8A8") if n in alone]
    several.append(once_quantized(several[-1], jq.ArrayConfig()))
    return [[c for c in kind if _is_chosen(c, only)] for kind in (single, several)], missing


def _is_chosen(contender, only):
    is_reference = contender.name.startswith(REFERENCE)
    return is_reference or any(word in contender.name for word in only or [""])


@functools.cache
def shapes_of(contender: Contender, shape: tuple[int, int]) -> Any:
    """Shapes of the prepared weights. Nothing is computed if the contender is pure JAX."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return jax.eval_shape(contender.prepare, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
        except jax.errors.TracerArrayConversionError:  # Keras quantizes in NumPy.
            weights = contender.prepare(jnp.zeros(shape, jnp.bfloat16))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)


def measure(chip: str, contender: Contender, shape: tuple[int, int], rows: int) -> dict[str, Any]:
    """One row of results: the estimate, or the reason why there is not one."""
    about = {
        "chip": chip,
        "contender": contender.name,
        "is_ours": contender.is_ours,
        "K": shape[0],
        "N": shape[1],
        "rows": rows,
        "dtype": "bfloat16",
    }
    try:
        return about | estimated(chip, contender, shape, rows)
    except Exception as error:  # Groups that do not divide, or an unreadable program: reported.
        return about | {"error": f"{type(error).__name__}: {error}"}


def estimated(chip: str, contender: Contender, shape: tuple[int, int], rows: int) -> dict[str, Any]:
    """The compiler's estimate and the roofline."""
    weights, x = shapes_of(contender, shape), jax.ShapeDtypeStruct((rows, shape[0]), jnp.bfloat16)
    out = jax.eval_shape(contender.run, x, weights)
    size = sum(packed_bytes(a) for a in jax.tree.leaves((x, weights, out)))
    operations = 2 * rows * math.prod(shape) * len(jax.tree.leaves(out))
    found = estimate(chip, compile_for(chip, contender.run, x, weights))
    return {
        "compiler_estimate_microseconds": found.microseconds,
        "roofline_microseconds": 1e6 * CHIPS[chip].limit(size, operations, contender.arithmetic),
        "least_bytes": size,
        "operations": operations,
        "hbm_bytes": found.hbm_bytes,
        "temporary_bytes": found.temporary_bytes,
        "kernel_bytes": found.kernel_bytes,
        "kernel_operations": found.kernel_operations,
        "is_whole": found.is_whole,
    }


def table(title: str, results: list[dict[str, Any]]) -> rich.table.Table:
    """One line per contender, one column per number of rows."""
    columns = list(dict.fromkeys(r["rows"] for r in results))
    first = results[0]["contender"]
    found = rich.table.Table("by", *(f"M={m}" for m in columns), title=title)
    cells = {(r["contender"], r["rows"]): r for r in results}
    times = {m: [_time(r) for r in results if r["rows"] == m] for m in columns}
    best = {m: min(t for t in found if t is not None) for m, found in times.items() if any(found)}
    for name in dict.fromkeys(r["contender"] for r in results):
        found.add_row(
            name, *(_cell(cells[name, m], _time(cells[first, m]), best.get(m)) for m in columns)
        )
    return found


def _time(result):
    return result.get("compiler_estimate_microseconds")


def _cell(result, reference, best):
    time = _time(result)
    if time is None:
        return "[red]not compiled[/red]"
    mark = "" if result["is_whole"] else "> "
    mark += "count " if result["kernel_bytes"] else ""
    moved = f"{result['hbm_bytes'] / 1e6:.0f}+{result['temporary_bytes'] / 1e6:.0f}"
    text = f"{mark}{time:.1f} ({result['roofline_microseconds']:.1f}) {moved} MB"
    if reference is not None and time > 1.05 * reference:
        return f"[red]{text}[/red]"
    return f"[bold]{text}[/bold]" if time == best else text


def suite(arguments: Any) -> dict[str, Any]:
    """Runs the suite, prints its tables, and returns what the JSON file holds."""
    chips = arguments.chips or (CHIPS if arguments.full else DEFAULT_CHIPS)
    shapes = arguments.shapes or (WEIGHTS if arguments.full else DEFAULT_SHAPES)
    rows = arguments.rows or ((*ROWS, 4096) if arguments.full else DEFAULT_ROWS)
    kinds, missing = fields(arguments.only)
    console = rich.console.Console(width=max(120, rich.console.Console().width))
    console.print(
        "Microseconds (of the roofline), MB through HBM + temporaries: an estimate by the "
        f"compiler, not a measurement. Not installed: {', '.join(missing) or '-'}."
    )
    results = []
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as bar:
        total = len(chips) * len(shapes) * len(rows) * sum(len(k) for k in kinds)
        task = bar.add_task("", total=total)
        for name, kind in itertools.product(shapes, kinds):
            for chip in chips:
                part = []
                for m, c in itertools.product(rows, kind):
                    bar.update(task, description=f"{chip}, {name}, {m} rows, {c.name}")
                    part.append(measure(chip, c, WEIGHTS[name], m))
                    bar.advance(task)
                title = f"{chip}, {name} {WEIGHTS[name]}, bfloat16 activations, compiler's estimate"
                console.print(table(title, part))
                results += part
    for name, why in dict.fromkeys((r["contender"], r["error"]) for r in results if "error" in r):
        console.print(f"Not compiled: {name}: {why[:200]}", markup=False)
    return {"not_installed": missing, "is_estimate_of_the_compiler": True, "products": results}
