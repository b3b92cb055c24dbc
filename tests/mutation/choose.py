"""Which tests to run for a change, by what `record.py` wrote."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence

from .mutants import Mutant

# To collect the tests of many modules takes longer than to run them.
LIKELY_MODULES = 3
LIKELY_TESTS = 25


@dataclasses.dataclass(frozen=True, eq=False)
class Test:
    """A test that passed: its name, seconds, and the lines that it ran by file."""

    name: str
    seconds: float
    lines: dict[str, frozenset[int]]

    @property
    def function(self) -> str:
        return self.name.partition("[")[0]

    @property
    def module(self) -> str:
        return self.name.partition("::")[0]


def read_records(folder: pathlib.Path) -> list[Test]:
    """The tests of all processes, those that are fastest first."""
    tests = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            lines = {name: frozenset(numbers) for name, numbers in row["lines"].items()}
            tests[row["test"]] = Test(row["test"], row["seconds"], lines)
    return sorted(tests.values(), key=lambda test: test.seconds)


def tests_for(mutant: Mutant, tests: Sequence[Test], seconds: float) -> list[list[Test]]:
    """Tests that may notice a change, in two parts: a few likely ones of few modules, and others.

    First come those that run the statement: of the module that is named like the file, of the
    folder of its layer, and of others. After them come the others of their modules. If none runs
    the statement (an import does, or another test traced it), those that run the function or class
    around it, or the file.

    Args:
        mutant: the change.
        tests: of `read_records`.
        seconds: how long the tests may take together, but the first runs in any case.
    """
    _, layer, *_, name = mutant.path.split("/")

    def distance(test: Test) -> tuple[bool, bool]:
        is_named = test.module.endswith(f"/test_{name}")
        return not is_named, not test.module.startswith(f"tests/{layer}/")

    concerned = sorted(_running(mutant, tests), key=distance)
    modules = {test.module: None for test in concerned}
    named = {test.module for test in tests if test.module.endswith(f"/test_{name}")}
    others = [t for t in tests if t.module in named.union(modules) and t not in concerned]
    first = [test for test in concerned if test.module in list(modules)[:LIKELY_MODULES]]
    likely = _within(_spread(first)[:LIKELY_TESTS], seconds)
    rest = [test for test in [*_spread(concerned), *_spread(others)] if test not in likely]
    return [likely, _within(rest, seconds)]


def _running(mutant, tests):
    for first, last in [(mutant.line, mutant.end), *mutant.scopes, (0, float("inf"))]:
        found = [
            test
            for test in tests
            if any(first <= line <= last for line in test.lines.get(mutant.path, ()))
        ]
        if found:
            return found
    return []


def _spread(tests: Iterable[Test]) -> list[Test]:
    """One row of each test, then a second of each, and so on."""
    rows: collections.Counter[str] = collections.Counter()
    places: dict[Test, int] = {}
    for test in tests:
        places[test] = rows[test.function]
        rows[test.function] += 1
    return sorted(places, key=lambda test: places[test])


def _within(tests, seconds):
    kept = []
    for test in tests:
        if not kept or test.seconds <= seconds:
            kept.append(test)
            seconds -= test.seconds
    return kept
