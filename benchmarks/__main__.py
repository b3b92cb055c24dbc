"""`python -m benchmarks --suite cpu`: prints tables, and writes what was measured as JSON."""

import argparse
import json
import pathlib

from . import cpu, machine, tpu, tpu_compiler
from .shapes import ROWS, WEIGHTS

SUITES = {"cpu": cpu.suite, "tpu-compile": tpu.suite}
# What must be done before JAX looks for devices.
PREPARATIONS = {"tpu-compile": tpu_compiler.prepare}


def main() -> None:
    """Runs one suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--shapes", nargs="+", choices=WEIGHTS, help="of the weights; all")
    parser.add_argument("--rows", nargs="+", type=int, help=f"of inputs; {ROWS}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--chips", nargs="+", choices=tpu_compiler.CHIPS, help="of tpu-compile")
    parser.add_argument("--full", action="store_true", help="of tpu-compile: all, for hours")
    parser.add_argument("--json", type=pathlib.Path, default=None, help="file for the results")
    arguments = parser.parse_args()
    PREPARATIONS.get(arguments.suite, lambda: None)()
    about = machine.description()
    print(", ".join(f"{k}: {v}" for k, v in about.items()))
    results = {"machine": about, **SUITES[arguments.suite](arguments)}
    path = arguments.json or pathlib.Path(f"benchmark-{arguments.suite}.json")
    path.write_text(json.dumps(results, indent=1))
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
