"""`python -m benchmarks.accuracy.tables`: the results in this folder as tables for the docs."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"
_COLUMNS = ("mean KL", "of nearest", "top-1 agreement", "perplexity", "seconds")


def main() -> None:
    """Prints all tables."""
    for path in sorted(RESULTS.glob("*.json")):
        for rows in tables(json.loads(path.read_text())["results"]):
            print("\n".join(rows), end="\n\n")


def tables(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lines of a table for each config, relative to its row `nearest`, the lowest KL first."""
    out = []
    for bits in dict.fromkeys(r["bits"] for r in results):
        rows = sorted((r for r in results if r["bits"] == bits), key=lambda r: r["divergence"])
        first = next((r["divergence"] for r in rows if r["name"] == "nearest"), None)
        least = min(r["bits_per_weight"] for r in rows)  # Multipliers add a little.
        title = f"{least:.2f} bits" if bits[0].isdigit() else bits
        lines = [f"| {title} | {' | '.join(_COLUMNS)} |", "|---" * (1 + len(_COLUMNS)) + "|"]
        out.append(lines + [_line(r, first) for r in rows])
    return out


def _line(r: Mapping[str, Any], first: float | None) -> str:
    ratio = "" if first is None else f"{r['divergence'] / first:.2f}"
    cells = (f"{r['divergence']:.3f}", ratio, f"{r['agreement']:.3f}", f"{r['perplexity']:.1f}")
    return f"| {r['name']} | {' | '.join(cells)} | {r['seconds']:.0f} |"


if __name__ == "__main__":
    main()
