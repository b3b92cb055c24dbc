"""Time of updates of optimizer states: what is measured, and its table."""

import pathlib
from functools import partial

import jax
import pytest

from benchmarks.training import finetuning_peers, tables, updates

ROOT = pathlib.Path(__file__).parents[2]


@jax.numpy_dtype_promotion("standard")  # Optax mixes dtypes.
def test_rows_hold_time_and_bytes_per_parameter(monkeypatch):
    monkeypatch.setattr(finetuning_peers, "PEERS", ())
    monkeypatch.setattr(updates, "least_seconds", lambda steps: {k: len(k) for k in steps})
    rows = updates.measure("one", [(64, 128)])
    assert [r["contender"] for r in rows] == ["float32", "8-bit", "4-bit"]
    assert {r["shapes"] for r in rows} == {"one"}
    assert [r["bytes"] for r in rows] == pytest.approx([8, 2, 1], abs=0.07)
    assert [r["nanoseconds"] for r in rows] == pytest.approx([1e9 * n / 8192 for n in (7, 5, 5)])


@jax.numpy_dtype_promotion("standard")
def test_a_step_updates_parameters_and_state_in_place():
    step, _ = updates.jax_contender(None, [(8, 4)])
    assert step() is None
    assert step() is None


def test_contenders_alternate_and_the_least_time_counts():
    calls = []
    steps = {name: partial(calls.append, name) for name in "ab"}
    found = updates.least_seconds(steps)
    assert calls == ["a", "b"] * updates.ROUNDS
    assert all(0 <= x < 1 for x in found.values())


def test_the_table_divides_by_float32():
    rows = [
        {"shapes": s, "contender": c, "nanoseconds": ns, "bytes": size}
        for s, c, ns, size in (
            ("A", "float32", 2, 8), ("A", "8-bit", 5, 2.0625),
            ("B", "float32", 4, 8), ("B", "8-bit", 4, 2.0625),
        )
    ]  # fmt: skip
    assert tables.updates_table(rows) == [
        "| AdamW | bytes | A | B |",
        "|---|---|---|---|",
        "| float32 | 8.00 | 2.0 (1.0) | 4.0 (1.0) |",
        "| 8-bit | 2.06 | 5.0 (2.5) | 4.0 (1.0) |",
    ]


def test_the_table_of_the_docs_is_that_of_the_results():
    found = tables.updates_table(tables.read("updates"))
    assert "\n".join(found) in (ROOT / "docs/training.md").read_text()
