"""`python -m benchmarks.training.tables`: the results in this folder as tables for the docs."""

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"
REFERENCE, NEAREST = "float32", "nearest"
_COLUMNS = ("held-out loss", "above float32", "MB of state", "CPU seconds per step", "seeds")
_DISTILLED = ("mean KL", "recovered", "steps", "CPU seconds per step")


def read(name: str) -> list[dict[str, Any]]:
    """The results of a part."""
    return json.loads((RESULTS / f"{name}.json").read_text())[name]


def smollm2_table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table; losses are compared seed by seed."""
    exact = {r["seed"]: r["loss"] for r in results if r["contender"] == REFERENCE}
    lines = [f"| SmolLM2 | {' | '.join(_COLUMNS)} |", "|---" * (1 + len(_COLUMNS)) + "|"]
    for name in dict.fromkeys(r["contender"] for r in results):
        rows = [r for r in results if r["contender"] == name]
        above = [100 * (r["loss"] / exact[r["seed"]] - 1) for r in rows]
        cells = (
            f"{statistics.fmean(r['loss'] for r in rows):.4f}",
            "" if name == REFERENCE else f"{statistics.fmean(above):+.2f} %",
            f"{rows[-1]['bytes'] / 1e6:.0f}",
            f"{statistics.fmean(r['cpu_seconds_per_step'] for r in rows):.1f}",
            str(len(rows)),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def distillation_table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table; the share that is recovered is that of rounding to nearest."""
    lost = {r["scheme"]: r["divergence"] for r in results if r["contender"] == NEAREST}
    lines = [f"| scheme | method | {' | '.join(_DISTILLED)} |", "|---" * 6 + "|"]
    for r in results:
        share = 1 - r["divergence"] / lost[r["scheme"]]
        is_trained = r["steps"] > 0
        cells = (
            f"{r['divergence']:.3f}",
            "" if r["contender"] == NEAREST else f"{100 * share:.0f} %",
            str(r["steps"]) if is_trained else "",
            f"{r['cpu_seconds_per_step']:.1f}" if is_trained else "",
        )
        lines.append(f"| {r['scheme']} | {r['contender']} | {' | '.join(cells)} |")
    return lines


def updates_table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table: nanoseconds per parameter, and times those of float32, donated alike."""
    shapes = list(dict.fromkeys(r["shapes"] for r in results))
    found = {(r["contender"], r["donates"], r["shapes"]): r for r in results}
    lines = [f"| AdamW | bytes | {' | '.join(shapes)} |", "|---" * (2 + len(shapes)) + "|"]
    for name, donates in dict.fromkeys((r["contender"], r["donates"]) for r in results):
        rows = [found[name, donates, s] for s in shapes]
        times = [r["nanoseconds"] for r in rows]
        exact = [found[REFERENCE, donates, s]["nanoseconds"] for s in shapes]
        cells = [f"{t:.1f} ({t / e:.1f})" for t, e in zip(times, exact, strict=True)]
        label = name if donates else f"{name}, not donated"
        lines.append(f"| {label} | {rows[0]['bytes']:.2f} | {' | '.join(cells)} |")
    return lines


TABLES = {
    "smollm2": smollm2_table,
    "distillation": distillation_table,
    "updates": updates_table,
}


def main() -> None:
    """Prints the tables."""
    for name, lines_of in TABLES.items():
        print("\n".join([*lines_of(read(name)), ""]))


if __name__ == "__main__":
    main()
