"""`python -m benchmarks --suite cpu`: prints tables, and writes what was measured as JSON."""

import argparse
import json
import pathlib

from . import cpu, machine
from .shapes import ROWS, WEIGHTS

SUITES = {"cpu": cpu.suite}


def main() -> None:
    """Runs one suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--shapes", nargs="+", choices=WEIGHTS, help="of the weights; all")
    parser.add_argument("--rows", nargs="+", type=int, choices=ROWS, help="of inputs; all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=pathlib.Path, default=None, help="file for the results")
    arguments = parser.parse_args()
    about = machine.description()
    print(", ".join(f"{k}: {v}" for k, v in about.items()))
    results = {"machine": about, **SUITES[arguments.suite](arguments)}
    path = arguments.json or pathlib.Path(f"benchmark-{arguments.suite}.json")
    path.write_text(json.dumps(results, indent=1))
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
