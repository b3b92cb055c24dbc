"""What a run leaves out, on items like those of pytest."""

import dataclasses
import itertools

import pytest

from . import selection


@dataclasses.dataclass(frozen=True)
class Item:
    nodeid: str
    marks: tuple = ()

    def get_closest_marker(self, name):
        return next((m for m in self.marks if m.name == name), None)


def table(name, rows, *marks):
    return [Item(f"{name}[{i}]", tuple(m.mark for m in marks)) for i in range(rows)]


def kept(items, with_slow=False, most_rows=None):
    return [item.nodeid for item in selection.to_run(items, with_slow, most_rows)]


def test_unmarked_tests_run_whole_and_in_order():
    items = [*table("a", 5), Item("b")]
    assert kept(items) == [item.nodeid for item in items]


def test_slow_tests_run_where_they_are_asked_for():
    items = [*table("a", 2, pytest.mark.slow), Item("b")]
    assert kept(items) == ["b"]
    assert kept(items, with_slow=True) == ["a[0]", "a[1]", "b"]


@pytest.mark.parametrize(("count", "most"), [(3, None), (9, 3), (20, 3)])
def test_rows_are_spread_over_the_table(count, most):
    found = kept(table("a", 12, pytest.mark.some_rows(count)), most_rows=most)
    numbers = [int(name[2:-1]) for name in found]
    assert len(numbers) == 3
    assert [b - a for a, b in itertools.pairwise(numbers)] == [4, 4]
    assert kept(table("a", 2, pytest.mark.some_rows(count))) == ["a[0]", "a[1]"]


def test_tests_and_versions_of_jax_run_different_rows(monkeypatch):
    def first(name):
        return kept(table(name, 100, pytest.mark.some_rows(1)))[0].removeprefix(name)

    assert len({first(name) for name in "abcdef"}) > 3
    before = first("a")
    monkeypatch.setattr(selection.jax, "__version__", "9.9")
    assert first("a") != before
