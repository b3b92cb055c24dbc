"""The suite of experts."""

import json
import pathlib

import numpy as np
import pytest

from benchmarks import experts

ROOT = pathlib.Path(__file__).parents[2]


def test_each_token_has_different_experts():
    sizes = np.asarray(experts.routed(3))
    assert sizes.shape == (experts.EXPERTS,)
    assert sizes.sum() == 3 * experts.PER_TOKEN
    assert sizes.max() <= 3


@pytest.mark.usefixtures("quick_compilation")
def test_the_suite_measures_each_scheme_beside_xla(monkeypatch, capsys):
    for name, value in {"EXPERTS": 4, "LENGTH": 256, "COLUMNS": 48, "PER_TOKEN": 2}.items():
        monkeypatch.setattr(experts, name, value)
    monkeypatch.setattr(experts, "TOKENS", (1, 3))
    rows = experts.suite(None)["experts"]
    assert [r["column"] for r in rows] == ["1 token"] * 9 + ["3 tokens"] * 9
    by_xla = {f"{name} of XLA" for name in experts.SCHEMES}
    assert {r["contender"] for r in rows} == {"float32", *experts.SCHEMES, *by_xla}
    assert all(r["milliseconds"] > 0 and r["speed"] > 0 for r in rows)
    assert [r["speed"] for r in rows if r["contender"] == "float32"] == [1, 1]
    assert "\n".join(experts.table(rows)) in capsys.readouterr().out


def test_the_table_of_the_docs_is_that_of_the_results():
    found = json.loads((ROOT / "benchmarks/results/experts.json").read_text())
    assert "\n".join(experts.table(found["experts"])) in (ROOT / "docs/speed.md").read_text()
