"""Checkpoints quantized tensor by tensor and in parts: the bytes of quantizing them at once."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jaxquant as jq
from jaxquant import checkpoints
from jaxquant.checkpoints.dequantized import dequantized
from jaxquant.tree.internal import TreeWriter

P = jax.P
PART = 2000
QUANTIZE: Any = sys.modules["jaxquant.checkpoints.quantize"]
MODULE: Any = sys.modules["jaxquant.checkpoints.tensor_task"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


ARRAYS = {
    "embed.weight": normal(100, 128),
    "layers.0.w": normal(24, 128, seed=1).astype(ml_dtypes.bfloat16),
    "layers.0.norm.weight": normal(128, seed=2),
    "layers.1.w": normal(7, 128, seed=3),
    "ids": np.arange(300).reshape(100, 3),
    "scalar": np.float32(3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two shards with an index, as Hugging Face has them."""
    folder = tmp_path_factory.mktemp("model")
    names = sorted(ARRAYS)
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        arrays = {n: np.asarray(ARRAYS[n]) for n in names if files[n] == file}
        safetensors.numpy.save_file(arrays, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(MODULE, "_PART", PART)


def check_same_report(found, want):
    for row, other in zip(found.rows, want.rows, strict=True):
        assert dataclasses.replace(row, sqnr=None) == dataclasses.replace(other, sqnr=None)
        assert row.sqnr == pytest.approx(other.sqnr, abs=0.3)


SCHEMES = {
    "W4A16": jq.Scheme(jq.ArrayConfig(format=jq.INT4, group_size=32)),
    "W8A8": jq.W8A8,
    "FP8": jq.FP8,
    "NVFP4A16": jq.NVFP4A16,
    "per tensor": jq.Scheme(jq.ArrayConfig(per_tensor=True)),
    "2 rows share": [jq.Rule("layers.0.w", jq.ArrayConfig(group_size=(2, 128)), axis=(0, 1))],
}


@pytest.mark.slow
@pytest.mark.some_rows(3)
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("parts", [PART, 2**24], ids=["parts", "whole"])
def test_files_are_those_of_the_quantized_tree(folder, tmp_path, monkeypatch, name, parts):
    scheme = SCHEMES[name]
    rules = scheme if isinstance(scheme, list) else jq.tree.default_rules(scheme, axis=-1)
    want = jq.tree.quantize(ARRAYS, rules)
    jq.save(tmp_path / "want", want, {"note": "1"})
    monkeypatch.setattr(MODULE, "_PART", parts)
    report = checkpoints.write_quantized(
        tmp_path / "found", checkpoints.open(folder), scheme, metadata={"note": "1"}
    )
    assert (tmp_path / "found").read_bytes() == (tmp_path / "want").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found", "want"]
    check_same_report(report, jq.tree.report(ARRAYS, want, rules))


def test_quantize_returns_the_quantized_tree(folder):
    found = checkpoints.quantize(checkpoints.open(folder), jq.W8A8)
    want = jq.tree.quantize(ARRAYS, jq.tree.default_rules(jq.W8A8, axis=-1))
    assert set(found) == set(want)
    for name, leaf in want.items():
        for x, y in zip(jax.tree.leaves(found[name]), jax.tree.leaves(leaf), strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def mesh():
    return jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))


def rows_of(name, shape):
    return jax.NamedSharding(mesh(), P("a", None) if len(shape) == 2 and not shape[0] % 4 else P())


def columns_of(name, shape):
    return jax.NamedSharding(mesh(), P(None, "a") if shape[-1:] == (128,) and shape[1:] else P())


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [rows_of, columns_of])
def test_each_device_quantizes_its_part(folder, tmp_path, small_parts, sharding):
    opened = checkpoints.open(folder)
    found = checkpoints.quantize(opened, jq.W8A8, sharding=sharding)
    codes = found["embed.weight"].codes
    assert codes.sharding.is_equivalent_to(sharding("embed.weight", (100, 128)), 2)
    checkpoints.write_quantized(tmp_path / "one", opened, jq.W8A8)
    checkpoints.write_quantized(tmp_path / "many", opened, jq.W8A8, sharding=sharding)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()


def test_what_is_quantized_already_is_copied(folder, tmp_path):
    q = jq.quantize(normal(8, 64), jq.ArrayConfig(format=jq.INT4, group_size=16), axis=1)
    jq.save(tmp_path / "a", {"q": q, "w": normal(8, 64)})
    opened = checkpoints.open(tmp_path / "a")
    rules = [jq.Rule("w", jq.W8A8, axis=-1), jq.Rule("q", None)]
    report = checkpoints.write_quantized(tmp_path / "b", opened, rules)
    found = jq.load(tmp_path / "b")
    np.testing.assert_array_equal(found["q"].dequantize(), q.dequantize())
    want = jq.tree.report(jq.load(tmp_path / "a"), found, rules)
    for row, other in zip(report.rows, want.rows, strict=True):
        assert (row.scheme, row.codes, row.reason) == (other.scheme, other.codes, other.reason)
    assert [row.scheme for row in report.rows] == ["int4 g16", "int8 per channel, int8 inputs"]
    with pytest.raises(ValueError, match=r"q: stored quantized .*a rule with None, .*--requantize"):
        checkpoints.write_quantized(tmp_path / "b", opened, [jq.Rule("*", jq.W8A8, axis=-1)])


def stored_quantized():
    """QTensors in forms that files have: nested scales, zero points, offsets, swapped axes."""
    grouped = jq.ArrayConfig(format=jq.INT4, group_size=16, symmetric=False)
    plain = jq.quantize(normal(24, 96), grouped, axis=1)
    assert isinstance(plain.scale, jax.Array)
    nested = jq.quantize(plain.scale, jq.ArrayConfig(group_size=3), axis=1)
    return {
        "a": dataclasses.replace(plain, scale=nested, offset=plain.scale / 3),
        "b": jq.quantize(normal(96, 24, seed=1), grouped, axis=0).reorder((-1, -2)),
        "c": jq.quantize(normal(24, 96, seed=2), jq.ArrayConfig(group_size=(8, 32)), axis=(0, 1)),
        "d": jq.quantize(normal(24, 96, seed=3), jq.ArrayConfig(format=jq.NVFP4), axis=1),
        "e": jq.quantize(normal(24, 96, seed=4), jq.W8A8.weights, axis=1).astype(jnp.bfloat16),
        "empty": jq.quantize(jnp.zeros((0, 96)), jq.W8A8.weights, axis=1),
    }


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "a"
    jq.save(path, stored_quantized())
    return checkpoints.open(path)


@pytest.mark.slow
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_slices_of_quantized_tensors_are_dequantized(stored, data):
    name = data.draw(st.sampled_from(sorted(stored)))
    whole = np.asarray(stored_quantized()[name].dequantize())
    source = dequantized(name, stored[name].value)
    assert (source.shape, source.dtype) == (whole.shape, whole.dtype)
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in whole.shape]
    index = tuple(slice(*b) for b in bounds)
    np.testing.assert_array_equal(source.read(index), whole[index])


@pytest.mark.slow
def test_what_is_quantized_already_is_quantized_again_if_asked(stored, tmp_path, small_parts):
    rules = [jq.Rule("e", None), jq.Rule("*", jq.W8A8, axis=-1)]
    floats = {name: q.dequantize() for name, q in stored_quantized().items()}
    want = jq.tree.quantize(floats | {"e": stored_quantized()["e"]}, rules)
    jq.save(tmp_path / "want", want)
    report = checkpoints.write_quantized(tmp_path / "a", stored, rules, requantize=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "want").read_bytes()
    assert [row.sqnr is None for row in report.rows] == [False] * 4 + [True, False]
    found = checkpoints.quantize(stored, rules, requantize=True)
    for name, q in want.items():
        np.testing.assert_array_equal(found[name].dequantize(), q.dequantize())


def test_what_would_be_lost_by_quantizing_again_is_an_error(tmp_path):
    q = jq.quantize(normal(8, 64), jq.ArrayConfig(), axis=1)
    q = dataclasses.replace(q, inputs=jq.Inputs(multiplier=jnp.ones(64)))
    jq.save(tmp_path / "a", {"q": q, "w": normal(8, 64)})
    opened = checkpoints.open(tmp_path / "a")
    with pytest.raises(ValueError, match=r"q cannot be quantized again: its inputs.multiplier wou"):
        checkpoints.quantize(opened, jq.W8A8, requantize=True)
    rules = [jq.Rule("q", None), jq.Rule("w", jq.W8A8, axis=-1)]
    kept = checkpoints.quantize(opened, rules, requantize=True)["q"]
    assert kept.inputs.multiplier.shape == (64,)


METHODS = {
    "hqq": (jq.methods.HQQ(), jq.W4A16_ASYM),
    "sinq": ([jq.methods.SINQ(), jq.methods.Nearest()], jq.W4A8),
    "importance": (jq.methods.Importance(), jq.NF4A16),
    "gptq": (jq.methods.GPTQ(importance=True), jq.W4A16),
}


def statistics_of(names):
    x = normal(64, 128, seed=7)
    moment = jq.methods.SecondMoment.init(128).update(jnp.asarray(x))
    return {name: {jq.methods.SecondMoment: moment} for name in names}


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", METHODS)
def test_methods_give_the_files_of_the_quantized_tree(folder, tmp_path, small_parts, name):
    method, scheme = METHODS[name]
    weights = [key for key, x in ARRAYS.items() if np.ndim(x) == 2 and x.dtype != int]
    rules = [jq.Rule(key, scheme, axis=-1) for key in weights]
    statistics = statistics_of(weights)
    options = {"method": method, "statistics": statistics}
    want = jq.tree.quantize(ARRAYS, rules, **options)
    opened = checkpoints.open(folder)
    found = checkpoints.quantize(opened, rules, **options)
    chex.assert_trees_all_equal({w: found[w] for w in weights}, {w: want[w] for w in weights})
    report = checkpoints.write_quantized(tmp_path / "found", opened, rules, **options)
    jq.save(tmp_path / "want", want)
    assert (tmp_path / "found").read_bytes() == (tmp_path / "want").read_bytes()
    check_same_report(report, jq.tree.report(ARRAYS, want, rules))


def test_a_rule_with_a_method_keeps_it(folder):
    rules = [
        jq.Rule("embed.weight", jq.W4A16, axis=-1, method=jq.methods.Nearest()),
        jq.Rule("layers.*.w", jq.W4A16, axis=-1),
    ]
    found = checkpoints.quantize(checkpoints.open(folder), rules, method=[jq.methods.SINQ()])
    assert found["embed.weight"].inputs is None
    assert found["layers.0.w"].inputs.multiplier.shape == (128,)


def test_tensors_with_a_method_are_divided_among_devices(folder):
    mesh = jax.make_mesh((4,), ("x",))
    sharding = {name: jax.NamedSharding(mesh, P()) for name in ARRAYS}
    sharding["embed.weight"] = jax.NamedSharding(mesh, P("x"))
    rules = [jq.Rule("embed.weight", jq.W4A16, axis=-1, method=jq.methods.GPTQ())]
    statistics = statistics_of(["embed.weight"])
    alone, divided = (
        checkpoints.quantize(checkpoints.open(folder), rules, statistics=statistics, sharding=where)
        for where in (None, sharding)
    )
    q, other = alone["embed.weight"], divided["embed.weight"]
    np.testing.assert_array_equal(q.dequantize(), other.dequantize())
    assert {s.data.shape for s in other.codes.addressable_shards} == {(25, 128)}


def test_missing_statistics_are_an_error_before_anything_is_read(folder, tmp_path):
    rules = [jq.Rule("embed.weight", jq.W4A16, axis=-1)]
    error = "statistics must have those of embed.weight; got none"
    for act in (checkpoints.quantize, partial(checkpoints.write_quantized, tmp_path / "a")):
        with pytest.raises(ValueError, match=error):
            act(checkpoints.open(folder), rules, method=jq.methods.GPTQ())
    assert not list(tmp_path.glob("a*"))


def test_statistics_of_other_channels_are_an_error_that_names_the_tensor(folder, tmp_path):
    rules = [jq.Rule("embed.weight", jq.W8A8, axis=0)]
    options = {"method": jq.methods.GPTQ(), "statistics": statistics_of(["embed.weight"])}
    error = r"^embed.weight: SecondMoment must have the shape \(100, 100\)"
    for act in (checkpoints.quantize, partial(checkpoints.write_quantized, tmp_path / "a")):
        with pytest.raises(ValueError, match=error):
            act(checkpoints.open(folder), rules, **options)
    assert not list(tmp_path.glob("a*"))


def test_other_statistics_start_from_the_beginning(folder, tmp_path, monkeypatch):
    rules = [jq.Rule("embed.weight", jq.W4A16, axis=-1, method=jq.methods.GPTQ())]
    opened, statistics = checkpoints.open(folder), statistics_of(["embed.weight"])
    wrong = jax.tree.map(lambda x: x * 2, statistics)
    tasks = []
    monkeypatch.setattr(QUANTIZE, "TreeWriter", lambda path, task: tasks.append(task) or 1 / 0)
    for found in (statistics, statistics, wrong):
        with pytest.raises(ZeroDivisionError):
            checkpoints.write_quantized(tmp_path / "a", opened, rules, statistics=found)
    assert tasks[0] == tasks[1] != tasks[2]


def test_nan_is_found_by_name_and_leaves_the_old_file(tmp_path, small_parts):
    bad = normal(100, 128)
    bad[90, 3] = np.nan
    safetensors.numpy.save_file({"a": normal(4, 128), "b": bad}, tmp_path / "in.safetensors")
    (tmp_path / "out").write_text("old")
    with pytest.raises(ValueError, match=r"^b holds NaN or Inf"):
        checkpoints.write_quantized(
            tmp_path / "out", checkpoints.open(tmp_path / "in.safetensors"), jq.W8A8
        )
    assert (tmp_path / "out").read_text() == "old"


def test_a_stopped_run_goes_on_after_the_last_tensor(folder, tmp_path, small_parts):
    opened, seen = checkpoints.open(folder), []

    def stop(done, total, name):
        seen.append(name)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.write_quantized(tmp_path / "a", opened, jq.W8A8, progress=stop)
    # The next tensor was being written when the process was killed.
    with open(tmp_path / "a.partial" / "data", "ab") as file:
        file.write(b"half")
    with open(tmp_path / "a.partial" / "journal", "ab") as file:
        file.write(b'{"name": "sca')
    written = []

    def quantize_in_order(x, *rest):
        written.append(x.shape)
        return original(x, *rest)

    original = MODULE.quantize_in_order
    MODULE.quantize_in_order = quantize_in_order
    try:
        report = checkpoints.write_quantized(tmp_path / "a", opened, jq.W8A8)
    finally:
        MODULE.quantize_in_order = original
    # embed.weight, the first by name, was not quantized again.
    assert seen == ["embed.weight", "ids", "layers.0.norm.weight"]
    assert written == [(8, 128)] * 3 + [(7, 128)]
    checkpoints.write_quantized(tmp_path / "b", opened, jq.W8A8)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert [row.path for row in report.rows] == sorted(ARRAYS)


def test_another_task_starts_from_the_beginning(folder, tmp_path):
    opened = checkpoints.open(folder)

    def stop(done, total, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.write_quantized(tmp_path / "a", opened, jq.W8A8, progress=stop)
    checkpoints.write_quantized(tmp_path / "a", opened, jq.FP8)
    assert jq.load(tmp_path / "a")["embed.weight"].format == jq.FP8_E4M3


SCRIPT = """
import sys, time
import jaxquant as jq

def slowly(done, total, name):
    print(name, flush=True)
    time.sleep(0.5)

from jaxquant import checkpoints
from jaxquant.__main__ import main

write = checkpoints.write_quantized
checkpoints.write_quantized = lambda *args, **options: write(
    *args, **{**options, "progress": slowly}
)
sys.exit(main(["quantize", sys.argv[1], sys.argv[2], "--scheme", "W8A8"]))
"""


@pytest.mark.slow
def test_a_killed_process_leaves_what_the_next_goes_on_with(folder, tmp_path):
    target = tmp_path / "a"
    command = [sys.executable, "-c", SCRIPT, str(folder), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        first = [process.stdout.readline().strip() for _ in range(2)]
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    assert (tmp_path / "a.partial" / "journal").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert first == sorted(ARRAYS)[:2]
    # What was written after the second line is not known.
    assert next(s for s in again.splitlines() if s in ARRAYS) in sorted(ARRAYS)[2:4]
    want = jq.tree.quantize(ARRAYS, jq.tree.default_rules(jq.W8A8, axis=-1))
    found = jq.load(target)
    for name, leaf in want.items():
        for x, y in zip(jax.tree.leaves(found[name]), jax.tree.leaves(leaf), strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert not (tmp_path / "a.partial").exists()


def test_two_processes_cannot_write_the_same_file(tmp_path):
    writer = TreeWriter(tmp_path / "a", "task")
    with pytest.raises(ValueError, match=r"not be written by another process; got .*a, which is"):
        TreeWriter(tmp_path / "a", "task")
    assert (tmp_path / "a.partial" / "journal").exists()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_parts_of_a_leaf_are_joined(tmp_path):
    x = normal(10, 6)
    writer = TreeWriter(tmp_path / "a", "task")
    form = jax.ShapeDtypeStruct(x.shape, x.dtype)
    writer.add("empty", jax.ShapeDtypeStruct((0, 3), jnp.int4), [np.zeros((0, 3), jnp.int4)])
    writer.add("x", form, [x[:3], x[3:4], x[4:]], {"n": 1})
    assert writer.notes == {"x": {"n": 1}, "empty": None}
    writer.finish({"note": "mine"})
    jq.save(tmp_path / "b", {"x": x, "empty": jnp.zeros((0, 3), jnp.int4)}, {"note": "mine"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


DISTRIBUTED = """
import sys
from functools import partial
from typing import Any
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[3], 2, int(sys.argv[4]))
import jaxquant as jq
mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))

def rows_of(name, shape):
    is_matrix = len(shape) == 2 and shape[0] % 4 == 0
    return jax.NamedSharding(mesh, jax.P("a", None) if is_matrix else jax.P())

opened = jq.checkpoints.open(sys.argv[1])
report = jq.checkpoints.write_quantized(sys.argv[2], opened, jq.W8A8, sharding=rows_of)
assert [row.path for row in report.rows] == sorted(opened)
"""


@pytest.mark.slow
def test_two_processes_quantize_one_checkpoint(folder, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED, str(folder), str(tmp_path / "a"), address, str(i)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = [p.communicate(timeout=300)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors
    checkpoints.write_quantized(tmp_path / "b", checkpoints.open(folder), jq.W8A8)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
