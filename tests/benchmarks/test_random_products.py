"""The suite of random products."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

import jaxquant as jq
from benchmarks import random_products
from benchmarks.random_products import Case, drawn, measured, predicted, summary

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_products_are_drawn_alike_for_a_seed_and_differently_for_another():
    cases = drawn(300, 0)
    assert [str(c) for c in cases] == [str(c) for c in drawn(300, 0)]
    assert [str(c) for c in cases] != [str(c) for c in drawn(300, 1)]
    names = {c.scheme.weights.format.name for c in cases}
    assert names == {"int8", "int4", "nf4", "mxfp4", "nvfp4"}
    assert any(c.scheme.inputs for c in cases)
    assert any(not c.scheme.weights.symmetric for c in cases)
    for case in cases:
        weights = case.scheme.weights
        group = weights.group_size or weights.format.group_size or 1
        assert isinstance(group, int)
        assert case.length % group == 0
        assert 1 <= case.rows <= 2048
        assert 64 <= case.columns <= 8192


@pytest.mark.parametrize(
    "scheme", [jq.W8A8, dataclasses.replace(jq.W4A16, weights=jq.ArrayConfig(format=jq.NVFP4))]
)
def test_a_product_is_measured_and_explained(scheme, monkeypatch):
    monkeypatch.setattr(random_products, "OUT_OF_CACHE", 1)
    found = measured(Case(3, 256, 192, scheme), rounds=2)
    assert found["speed"] > 0
    assert 0 < found["of_best"] <= found["speed"]
    assert found["predicted"] is not None
    assert found["case"].startswith("3 x 256 x 192 ")


@pytest.mark.parametrize(
    "speeds, counted", [([0.5, 1.3, 1.2], 1.2), ([1.3], 1.3), ([0.7, 0.6, 0.8], 0.7), ([1.1], 1.1)]
)
def test_products_that_explain_is_wrong_about_are_timed_three_times(speeds, counted, monkeypatch):
    left = list(speeds)

    def one(case):
        speed = left.pop(0)
        return {"speed": speed, "of_best": speed, "predicted": 1.2, "warning": None}

    monkeypatch.setattr(random_products, "measured", one)
    case = Case(3, 256, 192, jq.W8A8)
    assert random_products.settled(case)["speed"] == counted
    assert not left


@dataclasses.dataclass
class Row:
    speeds: tuple[Any, ...]
    estimate: float | None


def test_what_explain_predicts():
    assert predicted(Row((), None)) is None
    assert predicted(Row((), 0.4)) == 0.4
    assert predicted(Row(((1, (4, 4), 2.0), (8, (4, 4), 8.0)), None)) == pytest.approx(4)


def test_the_summary_counts():
    def result(speed, of_best, guess, warning=None):
        return {"speed": speed, "of_best": of_best, "predicted": guess, "warning": warning}

    found = summary(
        [
            result(2.0, 1.0, 1.5),  # Told.
            result(0.5, 0.5, 1.5),  # Wrong, and slow without a warning.
            result(0.5, 0.5, 0.4, "XLA's float32 product is faster"),
            result(1.1, 0.8, None),  # Not clear, and slow without a warning.
            result(3.0, 1.0, None),  # Not told.
        ]
    )
    counts = {"products": 5, "slow": 3, "slow_without_warning": 2, "warned": 1}
    assert found == {**counts, "clear": 4, "told": 2, "median_speed": 1.1}


@pytest.mark.parametrize("name", ["random", "random-amx"])
def test_the_docs_have_the_counts_and_the_losing_cases_of_the_results(name):
    root = pathlib.Path(__file__).parents[2]
    found = json.loads((root / f"benchmarks/results/{name}.json").read_text())
    assert found["summary"] == summary(found["products"])
    text = " ".join((root / "docs/speed.md").read_text().split())
    assert random_products.in_words(found["summary"]) in text
    lines = "\n".join(random_products.losing(found["products"]))
    assert lines in (root / "docs/speed.md").read_text()


def test_losing_products_are_counted_by_what_computes_them():
    kinds = ("native", "float", None), ("native", "float", "slow"), ("integer", "int8", None)
    found = [
        {"case": f"1 x 2 x 3 int4 by {rows}", "implementation": name, "warning": warning,
         "of_best": of_best}
        for of_best in (0.5, 0.8, 0.95)
        for name, rows, warning in kinds
    ]  # fmt: skip
    assert random_products.losing(found)[2:] == [
        "| integer, int8 rows | no | 2 | 0.50 to 0.80 |",
        "| native, float rows | no | 2 | 0.50 to 0.80 |",
        "| native, float rows | yes | 2 | 0.50 to 0.80 |",
    ]
