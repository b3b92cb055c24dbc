"""`python -m benchmarks.llm_tables`: the results of `--suite llm` in this folder as tables."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from .tables import markdown

RESULTS = pathlib.Path(__file__).parent / "results" / "llm.json"
Row = Mapping[str, Any]


def main() -> None:
    """Prints all tables."""
    for title, lines in tables(json.loads(RESULTS.read_text())).items():
        print(title, "", *lines, "", sep="\n")


def tables(results: Mapping[str, Sequence[Row]]) -> dict[str, list[str]]:
    """Lines of the tables by their titles, one line per contender, one column per case."""
    return {
        "Decoding, sequences x tokens in the cache: ms per token of each sequence": markdown(
            results["decoding"], lambda r: f"{_time(r)} {100 * r['bandwidth']:.0f} %"
        ),
        "Prompts: ms": markdown(results["prompts"], _time),
        "Products + attention, and the whole step: ms": markdown(
            results["parts"],
            lambda r: f"{r['products']:.1f} + {r['attention']:.1f}, {r['whole']:.1f}",
        ),
    }


def _time(result: Row) -> str:
    return f"{result['milliseconds']:.1f} ({result['speed']:.2f})"


if __name__ == "__main__":
    main()
