"""The gpu suite: the error without a GPU, and the figures it derives from times."""

import argparse
import collections
import io
import json
import sys

import jax
import pytest
import rich.console

from benchmarks import cpu, gpu, gpu_compiler, gpu_goals
from benchmarks.__main__ import main
from benchmarks.products import SCHEMES, of_xla, ours

Row = collections.namedtuple("Row", "warning")


def test_without_a_gpu_the_suite_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--suite", "gpu"])
    with pytest.raises(SystemExit, match=r"needs a GPU that JAX can use; .* of platform 'cpu'"):
        main()


def test_times_are_per_multiplication_and_unsupported_cases_are_named(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "OUT_OF_CACHE", 1)
    monkeypatch.setattr(cpu, "BUDGET", 0.0)
    for name, value in {"PROBE": 2**12, "LENGTH": 8, "IN_A_ROW": 3}.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setitem(gpu.WEIGHTS, "tiny", (128, 24))
    w8a16, w4a16 = (ours(name, SCHEMES[name], "gpu") for name in ("W8A16", "W4A16"))
    found = [of_xla("bfloat16"), w8a16, gpu.forced(w8a16, "scaled"), gpu.forced(w4a16, "triton")]
    warned = []
    monkeypatch.setattr(gpu.jq, "explain", lambda *_: warned.append(1) or [Row("slow"), Row(None)])
    monkeypatch.setattr(gpu, "fields", lambda: (found, ["other"]))

    results = gpu.suite(argparse.Namespace(shapes=["tiny"], rows=[2], full=False))

    json.dumps(results)
    *measured, kernel = results["products"]
    assert [line["contender"] for line in measured] == [c.name for c in found[:-1]]
    assert "'triton' needs a GPU with CUDA" in kernel["unsupported"]
    for line in measured:
        assert line["microseconds"] == pytest.approx(1e3 * line["milliseconds"] / 3)
        assert line["operations"] == 3 * 2 * 2 * 128 * 24
        assert line["note"].startswith(f"{line['microseconds']:.1f} µs · ")
        assert line["error"] < 0.03
    assert measured[1]["bytes"] < measured[0]["bytes"]
    printed = capsys.readouterr().out
    assert "W8A16, scaled" in printed
    assert f"{measured[0]['microseconds']:.1f} µs" in printed
    assert "Not supported by W4A16, triton" in printed
    assert "Targets on an H200" in printed
    assert [line.get("warning") for line in results["products"]] == [None, "slow", "slow", None]
    assert len(warned) == 2
    assert results["goals"][0]["found"] is None
    assert "not installed" in printed


def test_forced_implementations_are_listed_beside_the_selected_ones():
    found, _ = gpu.fields()
    names = [c.name for c in found]
    forced = {"W4A16, triton", "W8A8, triton", "FP8, triton", "FP8, scaled"}
    assert {gpu.REFERENCE, *gpu.SCHEMES, *forced} <= set(names)
    assert all(c.is_jax for c in found)


def line_of(contender, shape, rows, **figures):
    return {"contender": contender, "is_ours": True, "shape": shape, "rows": rows, **figures}


def test_each_target_has_a_line_that_says_whether_it_was_met():
    results = [
        line_of("XLA bfloat16", "up", 1, speed=1.0) | {"is_ours": False},
        line_of("W4A16", "up", 1, speed=0.9, share_of_bandwidth=0.2, warning="bfloat16 is faster"),
        line_of("W4A16, triton", "up", 16, speed=2.5, share_of_bandwidth=0.71, warning=None),
        line_of("W4A16, triton", "up", 64, speed=0.5, share_of_bandwidth=0.1, warning=None),
        line_of("W4A16, triton", "down", 1, speed=9.0, share_of_bandwidth=0.9, warning=None),
        line_of("W8A8", "down", 4096, speed=0.7, warning=None),
        line_of("W8A8, triton", "up", 4096, unsupported="no GPU"),
        line_of("W8A8, triton", "up", 64, speed=2.0, warning=None),
    ]
    goals = gpu_goals.outcomes(results)
    keys = ("goal", "contender", "case", "figure", "least", "found", "is_met")
    assert [tuple(line[key] for key in keys) for line in goals] == [
        ("W4A16", "W4A16", "up, M=1", "speed", 2.5, 0.9, False),
        ("W4A16", "W4A16, triton", "up, M=16", "speed", 2.5, 2.5, True),
        ("W4A16", "W4A16", "up, M=1", "share_of_bandwidth", 0.7, 0.2, False),
        ("W4A16", "W4A16, triton", "up, M=16", "share_of_bandwidth", 0.7, 0.71, True),
        ("W8A8", "W8A8", "down, M=4096", "speed", 1.4, 0.7, False),
        ("W8A8", "W8A8, triton", "up, M=4096", "speed", 1.4, None, False),
        ("FP8", "FP8", "all, M=4096", "speed", 1.5, None, False),
        ("slow, and explained", "W4A16", "up, M=1", "speed", 1, 0.9, True),
        ("slow, and explained", "W8A8", "down, M=4096", "speed", 1, 0.7, False),
    ]
    console = rich.console.Console(width=120, record=True, file=io.StringIO())
    console.print(gpu_goals.table(goals))
    rows = [line for line in console.export_text().splitlines() if "│" in line]
    verdicts = [next((v for v in ("met", "missed", "not run") if v in row), "") for row in rows]
    missed, met, unknown = "missed", "met", "not run"
    assert verdicts == [missed, met, missed, met, missed, unknown, unknown, met, missed]


def test_a_compiled_program_is_described_by_its_temporaries_and_instructions(tmp_path):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    w8a8 = ours("W8A8", SCHEMES["W8A8"], "gpu")
    (tmp_path / "other.ptx").write_text("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
    text = gpu_compiler.compiled(w8a8, (64, 32), 2, sharding, tmp_path)
    size, _, kinds = text.partition(" MB · ")
    assert float(size) >= 0
    assert kinds == "none"


def test_formats_are_read_from_matrix_instructions():
    code = """
        wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%f1},
        mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {%r1},
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1},
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f2},
    """
    assert gpu_compiler.multiplied(code) == ["f32 of bf16", "f32 of e4m3", "s32 of s8"]


def test_without_the_gpu_compiler_the_error_says_what_to_install(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("no cuda here")

    monkeypatch.setattr(gpu_compiler.topologies, "get_topology_desc", refuse)
    with pytest.raises(
        SystemExit, match=r"needs jax\[cuda13\] .* NotImplementedError: no cuda here"
    ):
        gpu_compiler.device()
