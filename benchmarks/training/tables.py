"""`python -m benchmarks.training.tables`: the results in this folder as a table for the docs."""

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"
REFERENCE = "float32"
_COLUMNS = ("held-out loss", "above float32", "MB of state", "seconds per step", "seeds")


def main() -> None:
    """Prints the table."""
    found = json.loads((RESULTS / "smollm2.json").read_text())["smollm2"]
    print("\n".join(table(found)))


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
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
            f"{statistics.fmean(r['seconds_per_step'] for r in rows):.1f}",
            str(len(rows)),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
