"""Changes the code in small ways, and counts how many changes a test notices.

    python -m tests.mutation --count 200 --seed 0 --folder build/mutation

draws changes of `core`, `ops`, `methods`, `training` and `keras`: as many of each, and of each kind
of change as many as of another: operators, comparisons, constants, negated conditions, removed
statements, swapped arguments. For each it runs, in a copy of the repository, the tests that run the
changed line, and those beside them, until one fails. Prints a table and each change that no test
noticed; ends with 1 if fewer than 95 % were noticed.

It runs the tests of these layers once, to record which lines each of them runs. Records, programs
that were compiled, and outcomes are in the folder: the same command goes on where it was stopped.
After the code or the tests have changed, give another folder.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

from .choose import read_records, tests_for
from .mutants import draw, mutants_of
from .run import Outcome, copy_repository, first_failure, run_mutant

ROOT = pathlib.Path(__file__).parents[2]
LAYERS = ("core", "ops", "methods", "training", "keras")
# Tests of these folders use the layers most.
TESTED_BY = (*LAYERS, "tree", "calibration", "allocation")
WANTED = 0.95


def drawn_mutants(root, count, seed, layers=LAYERS):
    """(layer, mutant) in the order of the layers: of each layer as many, whatever the others."""
    drawn = []
    for layer in layers:
        paths = sorted((root / "jaxquant" / layer).rglob("*.py"))
        mutants = [m for p in paths for m in mutants_of(str(p.relative_to(root)), p.read_text())]
        place = LAYERS.index(layer)
        share = count * (place + 1) // len(LAYERS) - count * place // len(LAYERS)
        drawn += [(layer, m) for m in draw(mutants, share, random.Random(f"{seed} {layer}"))]
    return drawn


def record(folder, copy):
    """Runs the tests once, if that was not done."""
    records = folder / "records"
    if not records.exists():
        started = folder / "unfinished-records"
        shutil.rmtree(started, ignore_errors=True)
        started.mkdir(parents=True)
        paths = [f"tests/{layer}" for layer in TESTED_BY]
        command = [sys.executable, "-m", "pytest", "-p", "tests.mutation.record", *paths]
        environment = {"PYTHONPATH": str(copy), "JAXQUANT_RECORD": str(started)}
        done = subprocess.run(command, cwd=copy, env={**os.environ, **environment}, check=False)
        if done.returncode not in (0, 1):  # 1: a test failed, and is not recorded.
            raise SystemExit(f"pytest ended with {done.returncode} while it recorded.")
        started.rename(records)
    return read_records(records)


def read_outcomes(path):
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["mutant"]: Outcome(**row) for row in map(json.loads, lines)}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = "of changes, if all layers are chosen; default: 200"
    parser.add_argument("--count", type=int, default=200, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of the draw; default: 0")
    text = "where records and outcomes are kept"
    parser.add_argument("--folder", type=pathlib.Path, required=True, help=text)
    text = "draw of these alone, the same changes; default: all"
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=LAYERS, help=text)
    text = "how long the tests of one change may take, by the record; default: 30"
    parser.add_argument("--seconds", type=float, default=30, help=text)
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
    copy = folder / f"copy-{os.getpid()}"
    copy_repository(ROOT, copy)
    try:
        outcomes = run(options, folder, copy)
        alarms = false_alarms(outcomes, copy)
    finally:
        shutil.rmtree(copy)
    print(table(outcomes))
    if alarms:
        print(f"Fails without a change, too: {alarms}")
    caught = sum(outcome.caught is not None for outcome in outcomes)
    return bool(alarms) or caught < WANTED * len(outcomes)


def run(options, folder, copy):
    tests = record(folder, copy)
    failure = first_failure([test.name for test in tests[:3]], copy, 600)
    if failure is not None:
        raise SystemExit(f"Tests must pass before a change, but this failed: {failure}.")
    path = folder / f"outcomes-{options.seed}.jsonl"
    known = read_outcomes(path)
    outcomes = []
    for layer, mutant in drawn_mutants(copy, options.count, options.seed, options.layers):
        outcome = known.get(str(mutant))
        if outcome is None:
            chosen = tests_for(mutant, tests, options.seconds)
            outcome = run_mutant(mutant, layer, chosen, copy)
            with path.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            print(f"{outcome.mutant}: {outcome.caught or 'NOT NOTICED'}", flush=True)
        outcomes.append(outcome)
    return outcomes


def false_alarms(outcomes, copy):
    """The first test that noticed a change and fails without one, too; None if there is none."""
    names = sorted({o.caught for o in outcomes if o.caught and "::" in o.caught})
    return first_failure(names, copy, 3600) if names else None


def table(outcomes):
    lines = ["| layer | changes | noticed |", "|---|---|---|"]
    for layer in (*LAYERS, "all"):
        of_layer = [o for o in outcomes if layer in (o.layer, "all")]
        caught = sum(o.caught is not None for o in of_layer)
        share = f" ({caught / len(of_layer):.1%})" if of_layer else ""
        lines.append(f"| {layer} | {len(of_layer)} | {caught}{share} |")
    return "\n".join([*lines, *[f"- {o.mutant}" for o in outcomes if o.caught is None]])


if __name__ == "__main__":
    sys.exit(main())
