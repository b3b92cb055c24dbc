"""`python -m benchmarks.accuracy.tables`: the results in this folder as tables for the docs."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"
REPEATED = RESULTS / "repeated"
_COLUMNS = ("mean KL", "of nearest", "top-1 agreement", "perplexity", "seconds")


def main() -> None:
    """Prints all tables."""
    for path in sorted(RESULTS.glob("*.json")):
        for rows in tables(json.loads(path.read_text())["results"]):
            print("\n".join(rows), end="\n\n")
    for path in sorted(REPEATED.glob("*.json")):
        print("\n".join(spread(json.loads(path.read_text())["results"])), end="\n\n")


def tables(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lines of a table for each config, relative to its row `nearest`, the lowest KL first."""
    out = []
    for bits in dict.fromkeys(r["bits"] for r in results):
        rows = sorted((r for r in results if r["bits"] == bits), key=lambda r: r["divergence"])
        nearest = next((r for r in rows if r["name"] == "nearest"), None)
        first = nearest["divergence"] if nearest else None
        # Multipliers add a little, and codebooks have no zero points.
        count = nearest["bits_per_weight"] if nearest else rows[0]["bits_per_weight"]
        title = f"{count:.2f} bits" if bits[0].isdigit() else bits
        lines = [f"| {title} | {' | '.join(_COLUMNS)} |", "|---" * (1 + len(_COLUMNS)) + "|"]
        out.append(lines + [_line(r, first) for r in rows])
    return out


def spread(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table of the mean KL and half its range over seeds, for each text."""
    texts = dict.fromkeys(r["text"] for r in results)
    heads = ["bits", "method", *(f"tested on {text}: mean KL | of nearest" for text in texts)]
    lines = [f"| {' | '.join(heads)} |", "|---" * (2 + 2 * len(texts)) + "|"]
    first: dict[tuple[str, str], float] = {}
    for bits, name in dict.fromkeys((r["bits"], r["name"]) for r in results):
        cells = [bits, name]
        for text in texts:
            key = bits, name, text
            found = [r["divergence"] for r in results if (r["bits"], r["name"], r["text"]) == key]
            if not found:
                cells += ["", ""]
                continue
            mean = sum(found) / len(found)
            of_nearest = mean / first.setdefault((bits, text), mean)  # `nearest` comes first.
            half = (max(found) - min(found)) / 2
            cells += [f"{mean:.3f}" + (f" ± {half:.3f}" if half else ""), f"{of_nearest:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _line(r: Mapping[str, Any], first: float | None) -> str:
    ratio = "" if first is None else f"{r['divergence'] / first:.2f}"
    cells = (f"{r['divergence']:.3f}", ratio, f"{r['agreement']:.3f}", f"{r['perplexity']:.1f}")
    return f"| {r['name']} | {' | '.join(cells)} | {r['seconds']:.0f} |"


if __name__ == "__main__":
    main()
