"""`python -m tests.mutation`: which changes it draws, and which tests it runs for them."""

import json
import random

import pytest

from .mutation import __main__ as command
from .mutation import choose, mutants, run

SOURCE = '''
"""A text of 3 words."""
import math


def area(width: int | None, height=2.5, is_half=False):
    assert width > 0
    if width is None and not is_half:
        raise ValueError(f"{1 + 1} widths")
    width = abs(width)
    sides = [math.hypot(height, s) for s in (width,) if s]
    sides.append(max(width, height))
    return width * height
'''


def texts(kind):
    return [
        f"{m.line}: {m.before} -> {m.after}"
        for m in mutants.mutants_of("a.py", SOURCE)
        if m.kind == kind
    ]


def test_each_kind_of_change_is_found_and_nothing_else():
    assert texts("operator") == [
        "8: width is None and not is_half -> (width is None or not is_half)",
        "13: width * height -> (width / height)",
    ]
    assert texts("comparison") == ["8: width is None -> (width is not None)"]
    assert texts("constant") == ["6: 2.5 -> 5.0", "6: False -> True"]
    assert texts("negated condition") == [
        "8: width is None and not is_half -> (not (width is None and (not is_half)))",
        "11: s -> (not s)",
    ]
    assert texts("removed statement") == [
        '9: raise ValueError(f"{1 + 1} widths") -> pass',
        "10: width = abs(width) -> pass",
        "12: sides.append(max(width, height)) -> pass",
    ]
    assert texts("swapped arguments") == ["11: math.hypot(height, s) -> (math.hypot(s, height))"]


def test_a_change_is_applied_where_it_was_found():
    source = "names = 'ä', 'ü'\nx = (\n    2 + 3)  # kept\n"
    (mutant,) = [m for m in mutants.mutants_of("a.py", source) if m.kind == "operator"]
    assert mutant.apply(source) == "names = 'ä', 'ü'\nx = (\n    (2 - 3))  # kept\n"
    assert str(mutant) == "a.py:3: 2 + 3 -> (2 - 3)"
    for each in mutants.mutants_of("a.py", SOURCE):
        compile(each.apply(SOURCE), "a.py", "exec")


def test_the_same_seed_draws_the_same_changes_of_all_kinds():
    found = mutants.mutants_of("a.py", SOURCE)
    drawn = mutants.draw(found, 8, random.Random(0))
    assert drawn == mutants.draw(found, 8, random.Random(0))
    assert drawn != mutants.draw(found, 8, random.Random(1))
    assert len(set(drawn)) == 8
    assert set(mutants.draw(found, 99, random.Random(0))) == set(found)


def test_layers_are_drawn_from_alike_and_apart(tmp_path):
    for layer in command.LAYERS:
        path = tmp_path / "jaxquant" / layer / "part" / "a.py"
        path.parent.mkdir(parents=True)
        path.write_text(SOURCE)
    drawn = command.drawn_mutants(tmp_path, 11, 0, ["methods", "core"])
    assert [layer for layer, _ in drawn] == ["methods"] * 2 + ["core"] * 2
    assert all(mutant.path == f"jaxquant/{layer}/part/a.py" for layer, mutant in drawn)
    assert command.drawn_mutants(tmp_path, 11, 0, ["core"]) == drawn[2:]
    assert len(command.drawn_mutants(tmp_path, 11, 0)) == 11


def record(folder, name, seconds, *lines, path="jaxquant/core/a.py"):
    with (folder / "1.jsonl").open("a") as file:
        row = {"test": name, "seconds": seconds, "lines": {path: lines}}
        file.write(json.dumps(row) + "\n")


def names(parts):
    return [[test.name for test in part] for part in parts]


def chosen(folder, line_of, seconds=100.0):
    source = SOURCE.lstrip("\n")
    found = mutants.mutants_of("jaxquant/core/a.py", source)
    (mutant,) = [m for m in found if str(m).endswith(line_of)]
    return names(choose.tests_for(mutant, choose.read_records(folder), seconds))


def test_tests_that_run_the_line_come_first_the_nearest_and_fastest_before_others(tmp_path):
    record(tmp_path, "tests/ops/test_b.py::far", 0.1, 9)
    record(tmp_path, "tests/core/test_b.py::near", 3, 9)
    record(tmp_path, "tests/core/test_a.py::named[2]", 2, 9)
    record(tmp_path, "tests/core/test_a.py::named[1]", 1, 9)
    record(tmp_path, "tests/core/test_a.py::beside", 1, 8)
    record(tmp_path, "tests/tree/test_c.py::elsewhere", 1, 8)
    line = "width = abs(width) -> pass"
    likely = ["core/test_a.py::named[1]", "core/test_b.py::near", "ops/test_b.py::far"]
    likely.append("core/test_a.py::named[2]")
    assert chosen(tmp_path, line) == [
        [f"tests/{name}" for name in likely],
        ["tests/core/test_a.py::beside"],
    ]
    assert chosen(tmp_path, line, seconds=0.5)[0] == ["tests/core/test_a.py::named[1]"]
    assert chosen(tmp_path, line, seconds=4)[0] == [f"tests/{name}" for name in likely[:2]]
    assert chosen(tmp_path, line, seconds=3)[0] == [f"tests/{name}" for name in likely[:3:2]]


def test_what_the_import_runs_is_tested_by_what_runs_the_function_or_the_file(tmp_path):
    record(tmp_path, "tests/core/test_x.py::of_function", 1, 9)
    record(tmp_path, "tests/core/test_x.py::of_file", 1, 1)
    assert chosen(tmp_path, "2.5 -> 5.0")[0] == ["tests/core/test_x.py::of_function"]
    (tmp_path / "1.jsonl").unlink()
    record(tmp_path, "tests/core/test_x.py::of_file", 1, 1)
    assert chosen(tmp_path, "2.5 -> 5.0")[0] == ["tests/core/test_x.py::of_file"]
    (tmp_path / "1.jsonl").unlink()
    record(tmp_path, "tests/core/test_x.py::of_another", 1, 9, path="jaxquant/core/b.py")
    assert chosen(tmp_path, "2.5 -> 5.0") == [[], []]


@pytest.mark.parametrize(
    ("code", "output", "wanted"),
    [
        (0, "2 passed", None),
        (1, "FAILED tests/test_a.py::b[1 - 2] - AssertionError", "tests/test_a.py::b[1 - 2]"),
        (2, "ERROR tests/test_a.py - TypeError: x", "tests/test_a.py"),
        (4, "ImportError while loading conftest 'c'", "the import of the package"),
        (-11, "", "killed by SIGSEGV"),
    ],
)
def test_what_caught_a_change_is_read_from_the_end_of_pytest(code, output, wanted):
    assert run._failure(code, output) == wanted


def test_an_end_of_pytest_without_a_failure_is_an_error():
    with pytest.raises(RuntimeError, match="ended with 5, without a test that failed"):
        run._failure(5, "no tests ran")


def test_the_table_counts_by_layer_and_lists_what_was_not_noticed():
    outcomes = [
        run.Outcome("a.py:1: 1 -> 2", "core", "constant", "tests/a.py::b", 3),
        run.Outcome("a.py:2: x -> pass", "core", "removed statement", None, 3),
    ]
    lines = command.table(outcomes).splitlines()
    assert lines[2] == "| core | 2 | 1 (50.0%) |"
    assert lines[3] == "| ops | 0 | 0 |"
    assert lines[7:] == ["| all | 2 | 1 (50.0%) |", "- a.py:2: x -> pass"]


@pytest.mark.slow
def test_a_change_of_a_file_is_caught_and_undone(tmp_path):
    (tmp_path / "jaxquant" / "core").mkdir(parents=True)
    path, source = tmp_path / "jaxquant" / "core" / "a.py", "def f(x):\n    return x + 1 + 0 * x\n"
    path.write_text(source)
    test = "from jaxquant.core.a import f\n\n\ndef test_f():\n    assert f(2) == 3\n"
    (tmp_path / "test_f.py").write_text(test)
    found = mutants.mutants_of("jaxquant/core/a.py", source)
    tests = [[choose.Test("test_f.py::test_f", 1, {})]]
    outcomes = {
        str(m).removeprefix("jaxquant/core/a.py:"): run.run_mutant(m, "core", tests, tmp_path)
        for m in found
    }
    caught = {name: outcome.caught for name, outcome in outcomes.items()}
    assert caught["2: x + 1 -> (x - 1)"] == "test_f.py::test_f"
    assert caught["2: x + 1 + 0 * x -> (x + 1 - 0 * x)"] is None
    assert path.read_text() == source
