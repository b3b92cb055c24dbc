"""Time of updates of optimizer states."""

import types
from functools import partial

import jax
import pytest

from benchmarks.training import finetuning_peers, updates


@jax.numpy_dtype_promotion("standard")  # Optax mixes dtypes.
def test_rows_hold_time_and_bytes_per_parameter(monkeypatch):
    monkeypatch.setattr(finetuning_peers, "PEERS", ())
    monkeypatch.setattr(updates, "least_seconds", lambda steps: {k: len(k[0]) for k in steps})
    rows = updates.measure("one", [(64, 128)])
    assert [r["contender"] for r in rows] == ["float32", "8-bit", "4-bit"] * 2
    assert [r["donates"] for r in rows] == [True] * 3 + [False] * 3
    assert {r["shapes"] for r in rows} == {"one"}
    assert [r["bytes"] for r in rows] == pytest.approx([8, 2, 1] * 2, abs=0.07)
    assert [r["nanoseconds"] for r in rows] == pytest.approx(
        [1e9 * n / 8192 for n in (7, 5, 5) * 2]
    )


@jax.numpy_dtype_promotion("standard")
def test_a_step_updates_parameters_and_state_in_place():
    step, _ = updates.jax_contender(None, [(8, 4)])
    assert step() is None
    assert step() is None


def test_contenders_alternate_and_the_least_time_counts(monkeypatch):
    calls, clock = [], [0.0, 0.0]

    def step(name, user, kernel):
        calls.append(name)
        # The third round is the fastest.
        slower = 1 + (calls.count(name) != 3)
        clock[:] = clock[0] + slower * user, clock[1] + slower * kernel

    def usage(who):
        return types.SimpleNamespace(ru_utime=clock[0], ru_stime=clock[1])

    monkeypatch.setattr(updates.resource, "getrusage", usage)
    found = updates.least_seconds({"a": partial(step, "a", 1, 2), "b": partial(step, "b", 4, 0)})
    assert calls == ["a", "b"] * updates.ROUNDS
    assert found == {"a": 3, "b": 4}
