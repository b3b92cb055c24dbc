"""Summarizes results of the suite tpu-compile: one table per chip, speeds by shape and rows.

    python -m benchmarks --suite tpu-compile --full --rows 8 128 2048 --json tpu.json
    python -m benchmarks.tpu_summary tpu.json [more.json ...]

Speeds are relative to XLA's bfloat16 and are ESTIMATES by the compiler: nothing ran. Less than 0.95
is red. `<` marks a Pallas kernel: its bytes and operations were counted as if it reached the
roofline, so the true speed is at most this.
"""

import argparse
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import rich.console
import rich.table

from .tpu import REFERENCE

_ESTIMATE = "compiler_estimate_microseconds"
Product = dict[str, Any]


def summary(chip: str, products: Iterable[Product], names: list[str]) -> rich.table.Table:
    """One line per shape and number of rows, one column per contender."""
    found = {(p["K"], p["N"], p["rows"], p["contender"]): p for p in products if p["chip"] == chip}
    table = rich.table.Table("weights", "rows", f"{REFERENCE}, us", *names)
    table.title = f"{chip}, speeds by the compiler's estimate"
    for k, n, rows in dict.fromkeys(key[:3] for key in found):
        reference = found[k, n, rows, REFERENCE][_ESTIMATE]
        cells = (_cell(found.get((k, n, rows, name), {}), reference) for name in names)
        table.add_row(f"{k}x{n}", str(rows), f"{reference:.1f}", *cells)
    return table


def _cell(product: Product, reference: float) -> str:
    if _ESTIMATE not in product:
        return "-"
    speed = reference / product[_ESTIMATE]
    # Kernels that only quantize do few operations per element; they are not marked.
    is_counted = product["kernel_operations"] >= product["operations"]
    text = f"{'< ' if is_counted else ''}{speed:.2f}"
    return f"[red]{text}[/red]" if speed < 0.95 else text


def main() -> None:
    """Reads files of results and prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_summary", description=__doc__)
    parser.add_argument("results", nargs="+", type=pathlib.Path)
    products = [
        p
        for path in parser.parse_args().results
        for p in json.loads(path.read_text())["products"]
        if " x 3" not in p["contender"]
    ]
    names = [n for n in dict.fromkeys(p["contender"] for p in products) if n != REFERENCE]
    console = rich.console.Console(width=max(120, rich.console.Console().width))
    for chip in dict.fromkeys(p["chip"] for p in products):
        console.print(summary(chip, products, names))


if __name__ == "__main__":
    main()
