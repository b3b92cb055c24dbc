"""The suite for GPUs: that it refuses without one, and what it makes of times."""

import argparse
import json
import sys

import pytest

from benchmarks import cpu, gpu
from benchmarks.__main__ import main
from benchmarks.products import SCHEMES, of_xla, ours

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_without_a_gpu_it_is_said(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--suite", "gpu"])
    with pytest.raises(SystemExit, match=r"needs a GPU that JAX sees; .* of platform 'cpu'"):
        main()


def test_times_are_of_one_product_and_what_cannot_run_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "OUT_OF_CACHE", 1)
    monkeypatch.setattr(cpu, "BUDGET", 0.0)
    for name, value in {"PROBE": 2**12, "LENGTH": 8, "IN_A_ROW": 3}.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setitem(gpu.WEIGHTS, "tiny", (128, 24))
    w8a16, w4a16 = (ours(name, SCHEMES[name], "gpu") for name in ("W8A16", "W4A16"))
    found = [of_xla("bfloat16"), w8a16, gpu.forced(w8a16, "scaled"), gpu.forced(w4a16, "triton")]
    monkeypatch.setattr(gpu, "fields", lambda: (found, ["other"]))

    results = gpu.suite(argparse.Namespace(shapes=["tiny"], rows=[2], full=False))

    json.dumps(results)
    *measured, kernel = results["products"]
    assert [line["contender"] for line in measured] == [c.name for c in found[:-1]]
    assert "'triton' needs a GPU with CUDA" in kernel["refusal"]
    for line in measured:
        assert line["microseconds"] == pytest.approx(1e3 * line["milliseconds"] / 3)
        assert line["operations"] == 3 * 2 * 2 * 128 * 24
        assert line["note"].startswith(f"{line['microseconds']:.1f} µs · ")
        assert line["error"] < 0.03
    assert measured[1]["bytes"] < measured[0]["bytes"]
    printed = capsys.readouterr().out
    assert "W8A16, scaled" in printed
    assert f"{measured[0]['microseconds']:.1f} µs" in printed
    assert "Refused by W4A16, triton" in printed
    assert "not installed" in printed


def test_forced_computations_stand_beside_those_that_are_chosen():
    found, _ = gpu.fields()
    names = [c.name for c in found]
    assert {gpu.REFERENCE, *gpu.SCHEMES, "W4A16, triton", "FP8, scaled"} <= set(names)
    assert all(c.is_jax for c in found)
