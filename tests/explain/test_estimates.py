"""Estimated speeds of products on CPU that were not measured."""

import dataclasses
import json
import math
import pathlib
import re
from functools import partial

import jax
import pytest

from benchmarks import convolutions
from jaxquant import INT4, NF4, explain, matmul
from jaxquant.explain import estimates, speeds
from jaxquant.explain.estimates import estimated_speed
from jaxquant.explain.machines import MACHINES, machine_for
from jaxquant.kernels import cpu
from jaxquant.kernels.cpu import library
from jaxquant.ops import Choice
from jaxquant.ops.record import OperandRecord, Record

from .operands import HAS_NATIVE, IS_MEASURED, W8A8, floats, stored

ROOT = pathlib.Path(__file__).parents[2]
BITS = {"int4 g128": 4.25, "int8": 8, "nf4 g64": 4.5}


def record_of(rows, shape, bits):
    lhs = OperandRecord(
        (rows, shape[0]), False, "float32", "float32", "float32", 4 * rows * shape[0]
    )
    size = int(math.prod(shape) * bits / 8)
    rhs = OperandRecord(shape, True, "int", "int", "float32", size)
    result = rows, shape[1]
    return Record("dot_general", lhs, rhs, result, 4 * math.prod(result), shape[0], rows, (), False)


# On the processor with AMX, XLA's float32 takes longer for 2 to 128 rows than its rates tell.
@pytest.mark.parametrize(("instructions", "least"), [("AVX512-VNNI", 0.5), ("AMX", 0.3)])
def test_estimates_agree_with_what_was_measured(instructions, least, monkeypatch):
    sets = library.INSTRUCTIONS[library.INSTRUCTIONS.index(instructions) :]
    monkeypatch.setattr(cpu, "instruction_sets", lambda: sets)
    (measured,) = (m for m in speeds.MEASUREMENTS if m.instructions == instructions)
    wrong, total = [], 0
    for line in measured.speeds:
        choice = Choice("cpu", None, line.implementation, line.inputs == "int8", True, ())
        for rows, speed in line.by_rows.items():
            record = record_of(rows, line.shape, BITS[line.weights])
            estimate = estimated_speed(record, choice, MACHINES[0])
            assert estimate is not None
            assert least < estimate / speed < 2, (line, rows, estimate)
            total += 1
            is_near = min(speed, estimate) > 0.87 and max(speed, estimate) < 1.15
            if (speed > 1) != (estimate > 1) and not is_near:
                wrong += [(line.weights, line.shape, rows, speed, estimate)]
    assert len(wrong) <= 0.05 * total, wrong


def test_estimates_of_experts_agree_with_what_was_measured(monkeypatch):
    """32 experts of 2048 x 768, 8 for each token, from `--suite experts`."""
    monkeypatch.setattr(cpu, "instruction_sets", lambda: ("AVX512-VNNI",))
    experts, length, columns = 32, 2048, 768
    found = json.loads((ROOT / "benchmarks/results/experts.json").read_text())["experts"]
    for r in found:
        name, bits = r["contender"], 8 if r["contender"].startswith("W8") else 4.25
        if name == "float32":
            continue
        is_integer = "A8" in name and (bits == 8 or "XLA" not in name)
        row = "native" if "XLA" not in name else "integer" if is_integer else "dequantize"
        rows = 8 * int(r["column"].split()[0])
        flat = record_of(rows, (experts, length, columns), bits)
        record = dataclasses.replace(
            flat,
            operation="ragged_dot",
            lhs=dataclasses.replace(flat.lhs, shape=(rows, length)),
            shape=(rows, columns),
            length=length,
            rows=None,
            experts=experts,
        )
        choice = Choice("cpu", None, row, is_integer, True, ())
        estimate = estimated_speed(record, choice, MACHINES[0]) or 0
        assert 1 / 5 < estimate / r["speed"] < 5, (r, estimate)
        assert (estimate > 1) == (r["speed"] > 1), (r, estimate)


@pytest.mark.skipif(not IS_MEASURED, reason="measured with AVX512-VNNI")
@pytest.mark.parametrize("name", convolutions.CASES)
def test_estimates_of_convolutions_agree_with_what_was_measured(name):
    """The table that `python -m benchmarks.convolutions` printed."""
    lines = (ROOT / "docs" / "keras.md").read_text().splitlines()
    cells = next(
        [c.strip() for c in x.split("│")[2:-1]]
        for x in lines
        if f"│ {name} │" in re.sub(" +", " ", x)
    )
    measured = dict(zip(convolutions.IMPLEMENTATIONS, cells, strict=True))
    run, x, _, q = convolutions.call_of(*convolutions.CASES[name])
    (row,) = explain(run, x, q, platform="cpu").rows
    speed, estimate = float(measured[row.implementation]), row.estimate or 0
    assert 0.5 < estimate / speed < 2
    is_near = min(speed, estimate) > 0.85 and max(speed, estimate) < 1.2
    assert is_near or (speed > 1) == (estimate > 1)
    words = "XLA's float32 convolution is faster, by estimate: this has"
    assert (row.warning or "").startswith(words) == (estimate < 0.97)


def test_convolutions_without_a_model_have_no_estimate():
    run, x, _, q = convolutions.call_of(*convolutions.CASES["3x3"])
    run = partial(run, implementation="integer")
    assert explain(run, x, q, platform="cpu").rows[0].estimate is None
    assert explain(run, x, q, platform="tpu").rows[0].estimate is None


def test_convolutions_by_floats_have_their_own_rates():
    run, x, _, q = convolutions.call_of(*convolutions.CASES["depthwise"])
    estimates = [
        explain(run, x, q, platform="cpu").rows[0].estimate or 0
        for q in (q, dataclasses.replace(q, inputs=None))
    ]
    assert 8 < estimates[0] < estimates[1] < 14


def row_of(rows, weights, dtype="float32", **options):
    x = jax.ShapeDtypeStruct((rows, weights.shape[0]), dtype)
    found = explain(lambda x, q: matmul(x, q, **options), x, weights, platform="cpu")
    return found.rows[0], str(found)


GROUPED = {"format": INT4, "group_size": 32, "axis": 0}


def test_dequantizing_is_estimated_and_warned_of():
    row, text = row_of(256, stored((2048, 2048), **GROUPED), implementation="dequantize")
    assert row.speeds == ()
    assert 0 < (row.estimate or 0) < 0.87
    words = (
        f"XLA's float32 product is faster, by estimate: this has {row.estimate:.2f} of its speed"
    )
    assert row.warning == words
    assert f"about {row.estimate:.2f}" in text
    assert "not measured" not in text.replace("estimates from these rates, not measured", "")
    few, _ = row_of(1, stored((2048, 2048), **GROUPED), implementation="dequantize")
    assert 0 < (few.estimate or 0) < (row.estimate or 0)


@pytest.mark.skipif(not HAS_NATIVE, reason="XLA dequantizes then")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_products_are_estimated_to_be_faster_without_a_warning(dtype):
    for options in (W8A8, {}):
        weights = stored((576, 1536), **GROUPED, **options).astype(dtype)
        row, text = row_of(1, weights, dtype)
        assert row.implementation == "native"
        assert (row.estimate or 0) > 1
        assert row.warning is None
        assert f"about {row.estimate:.2f}" in text


def test_measured_products_and_those_without_a_model_have_no_estimate():
    measured = [(1, stored((384, 1536), axis=0), "cpu")] if IS_MEASURED else []
    for rows, weights, platform in (*measured, (8, stored((384, 700), format=NF4), "tpu")):
        row = explain(matmul, floats(rows, 384), weights, platform=platform).rows[0]
        assert row.estimate is None
        assert bool(row.speeds) == (platform == "cpu")
    copies = jax.vmap(matmul, (0, None))
    row = explain(copies, floats(3, 2, 384), stored((384, 700), **GROUPED), platform="cpu").rows[0]
    assert row.estimate is None


@pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels were not measured then")
def test_what_other_instructions_were_measured_at_does_not_count(monkeypatch):
    product = matmul, floats(1, 384), stored((384, 1536), axis=0)
    found = {}
    for instructions in ("AVX512-VNNI", "AVX2", "AMX"):
        monkeypatch.setattr(cpu, "instruction_sets", lambda i=instructions: (i,))
        found[instructions] = explain(*product, platform="cpu").rows[0]
    assert found["AVX512-VNNI"].speeds
    assert found["AVX512-VNNI"].estimate is None
    for other in ("AVX2", "AMX"):
        assert found[other].speeds == ()
        assert (found[other].estimate or 0) > 0


def test_instruction_sets_all_have_rates():
    assert set(estimates._BY_INSTRUCTIONS) == set(library.INSTRUCTIONS)
    assert machine_for("cpu").platform == "cpu"


def test_amx_is_estimated_to_multiply_many_rows_of_codes_faster(monkeypatch):
    choice = Choice("cpu", None, "native", True, True, ())
    found = {}
    for instructions in ("AVX512-VNNI", "AMX"):
        monkeypatch.setattr(cpu, "instruction_sets", lambda i=instructions: (i,))
        found[instructions] = [
            estimated_speed(record_of(rows, (4096, 4096), 8), choice, MACHINES[0]) or 0
            for rows in (1, 15, 2048)
        ]
    assert found["AMX"][:2] == found["AVX512-VNNI"][:2]
    assert found["AMX"][2] > 1.5 * found["AVX512-VNNI"][2]


def test_amx_is_estimated_to_multiply_bfloat16_faster_than_float32(monkeypatch):
    monkeypatch.setattr(cpu, "instruction_sets", lambda: ("AMX", "AVX512-VNNI"))
    choice = Choice("cpu", None, "native", False, True, ())
    record = record_of(2048, (4096, 4096), 4.25)
    halves = dataclasses.replace(record.lhs, dtype="bfloat16")
    by_halves = estimated_speed(dataclasses.replace(record, lhs=halves), choice, MACHINES[0]) or 0
    assert by_halves > 3 * (estimated_speed(record, choice, MACHINES[0]) or 0)


@pytest.mark.skipif(not HAS_NATIVE, reason="XLA dequantizes then")
def test_rows_that_do_not_begin_with_a_byte_are_estimated_to_be_copied():
    choice = Choice("cpu", None, "native", False, True, ())
    even, odd = (
        estimated_speed(record_of(8, (length, 4096), 4.25), choice, MACHINES[0])
        for length in (4096, 4097)
    )
    assert even is not None
    assert odd is not None
    assert odd < 0.8 * even


@pytest.mark.skipif(not HAS_NATIVE, reason="XLA dequantizes then")
def test_many_results_of_short_float_rows_are_estimated_to_be_written_slowly(monkeypatch):
    monkeypatch.setattr(cpu, "instruction_sets", lambda: ("AVX512-VNNI",))
    speeds = [
        estimated_speed(record_of(rows, (length, 4096), 4.25), choice, MACHINES[0]) or 0
        for length, rows, choice in (
            (96, 1024, Choice("cpu", None, "native", False, True, ())),
            (96, 1024, Choice("cpu", None, "native", True, True, ())),
            (96, 256, Choice("cpu", None, "native", False, True, ())),
            (256, 1024, Choice("cpu", None, "native", False, True, ())),
        )
    ]
    assert speeds[0] < 0.97
    assert min(speeds[1:]) > 1
