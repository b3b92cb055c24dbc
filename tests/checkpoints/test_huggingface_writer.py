"""Written folders hold the same codes and scales, and appear whole or not at all."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import (
    FP8_E4M3,
    INT2,
    INT4,
    INT8,
    MXFP4,
    MXFP8,
    NF4,
    NVFP4,
    ArrayConfig,
    BlockRotation,
    Inputs,
    quantize,
)
from jaxquant.checkpoints import open_folder, write_folder

from .folders import loaded, value_of

CONFIG = {"model_type": "llama", "torch_dtype": "bfloat16"}
NAME = "model.layers.0.mlp.up_proj.weight"
GROUPS = ArrayConfig(format=INT4, group_size=32, scale_dtype="bfloat16")
SCHEMES: dict[str, tuple[ArrayConfig, ArrayConfig | None]] = {
    "int4": (GROUPS, None),
    "int4 asymmetric": (dataclasses.replace(GROUPS, symmetric=False), None),
    "int4 and activations": (GROUPS, ArrayConfig(format=INT8)),
    "int2": (dataclasses.replace(GROUPS, format=INT2), None),
    "int8 groups": (dataclasses.replace(GROUPS, format=INT8), None),
    "int8 channels": (ArrayConfig(format=INT8, symmetric=False), None),
    "int8 and activations": (ArrayConfig(format=INT8), ArrayConfig(format=INT8, symmetric=False)),
    "fp8 tensor": (
        ArrayConfig(format=FP8_E4M3, per_tensor=True),
        ArrayConfig(format=FP8_E4M3, per_tensor=True),
    ),
    "fp8 channels": (ArrayConfig(format=FP8_E4M3), ArrayConfig(format=FP8_E4M3)),
    "mxfp8": (ArrayConfig(format=MXFP8), ArrayConfig(format=MXFP8)),
    "mxfp4": (ArrayConfig(format=MXFP4), None),
    "mxfp4 and activations": (ArrayConfig(format=MXFP4), ArrayConfig(format=FP8_E4M3)),
    "nvfp4": (ArrayConfig(format=NVFP4), None),
}


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def quantized(scheme, shape=(6, 64)) -> Any:
    weights, inputs = SCHEMES[scheme]
    q = quantize(normal(*shape).astype(jnp.bfloat16), weights, axis=1)
    return dataclasses.replace(q, inputs=None if inputs is None else Inputs(inputs))


def written(path, *args, **kwargs):
    write_folder(path, *args, **kwargs)
    return open_folder(path)


def assert_equal_parts(a, b):
    assert type(a) is type(b)
    if isinstance(a, jq.QTensor):
        assert (a.format, a.dtype) == (b.format, b.dtype)
        assert_equal_parts(a.codes, b.codes)
        assert_equal_parts(a.scale, b.scale)
        assert_equal_parts(a.zero_point, b.zero_point)
    elif a is not None:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("is_swapped", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_written_as_they_are(tmp_path, scheme, is_swapped):
    q = quantized(scheme)
    given = q.reorder((-1, -2)) if is_swapped else q
    checkpoint = written(tmp_path / "model", {NAME: given, "norm.weight": jnp.ones(6)}, CONFIG)
    got = loaded(value_of(checkpoint, NAME))
    assert_equal_parts(got, q)
    expected = q.inputs and q.inputs.config
    assert (got.inputs and got.inputs.config) == expected
    np.testing.assert_array_equal(np.asarray(loaded(checkpoint["norm.weight"].value)), np.ones(6))
    assert checkpoint.metadata["config"]["model_type"] == "llama"


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_static_activations(tmp_path, is_symmetric):
    config = ArrayConfig(format=INT8, per_tensor=True, symmetric=is_symmetric)
    zero = None if is_symmetric else jnp.int8(3)
    inputs = Inputs(config, scale=jnp.float32(0.25), zero_point=zero)
    q = dataclasses.replace(quantized("int8 and activations"), inputs=inputs)
    got = loaded(value_of(written(tmp_path / "model", {NAME: q}, CONFIG), NAME)).inputs
    assert got.config == config
    assert (float(got.scale), got.zero_point) == (0.25, zero)


def test_blocks(tmp_path):
    config = ArrayConfig(format=FP8_E4M3, group_size=(4, 16))
    q = quantize(normal(8, 64), config, axis=(0, 1)).astype(jnp.bfloat16)
    assert_equal_parts(loaded(value_of(written(tmp_path / "a", {NAME: q}, CONFIG), NAME)), q)


@pytest.mark.parametrize("scheme", ["fp8 channels", "int8 and activations"])
def test_scales_of_columns(tmp_path, scheme):
    weights, inputs = SCHEMES[scheme]
    q = quantize(normal(6, 64), weights, axis=0)
    q = dataclasses.replace(q, inputs=Inputs(inputs)).astype(jnp.bfloat16)
    got = loaded(value_of(written(tmp_path / "a", {NAME: q}, CONFIG), NAME))
    np.testing.assert_array_equal(got.dequantize(), q.dequantize(), strict=True)


def test_single_scales_of_packed_weights_become_one_for_each_row(tmp_path):
    q = quantize(normal(6, 64), ArrayConfig(format=INT4, per_tensor=True)).astype(jnp.bfloat16)
    got = loaded(value_of(written(tmp_path / "a", {NAME: q}, CONFIG), NAME))
    np.testing.assert_array_equal(got.scale, np.broadcast_to(q.scale, (6, 1)))
    np.testing.assert_array_equal(got.codes, q.codes)


def test_the_configuration_for_one_scheme(tmp_path):
    params = {NAME: quantized("int4"), "model.embed.weight": normal(6, 64), "a.bias": jnp.ones(3)}
    config = {**CONFIG, "quantization_config": {"quant_method": "old"}}
    write_folder(tmp_path / "model", params, config)
    quantization = json.loads((tmp_path / "model" / "config.json").read_text())[
        "quantization_config"
    ]
    assert quantization["format"] == "pack-quantized"
    assert quantization["ignore"] == ["lm_head", "model.embed"]
    group = quantization["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "group",
        "group_size": 32,
    }


def test_several_schemes_have_groups_by_name(tmp_path):
    params = {"a.q.weight": quantized("int4"), "a.v.weight": quantized("fp8 channels")}
    params["b.q.weight"] = quantized("int4")
    checkpoint = written(tmp_path / "model", params, CONFIG)
    for name, q in params.items():
        assert_equal_parts(loaded(value_of(checkpoint, name)), q)
    groups = checkpoint.metadata["config"]["quantization_config"]["config_groups"]
    assert [g["targets"] for g in groups.values()] == [["a.q", "b.q"], ["a.v"]]
    assert value_of(checkpoint, "a.q.weight").inputs is None


@pytest.mark.parametrize("shard_bytes, count", [(4096, 3), (1, 5)])
def test_shards_and_their_index(tmp_path, shard_bytes, count):
    params = {f"a.{i}.weight": normal(8, 64, seed=i) for i in range(5)}
    checkpoint = written(tmp_path / "model", params, CONFIG, shard_bytes=shard_bytes)
    names = sorted(p.name for p in (tmp_path / "model").iterdir())
    assert names == [
        "config.json",
        *(f"model-0000{i + 1}-of-0000{count}.safetensors" for i in range(count)),
        "model.safetensors.index.json",
    ]
    for name, x in params.items():
        np.testing.assert_array_equal(value_of(checkpoint, name).read(), x)
    assert "quantization_config" not in checkpoint.metadata["config"]
    assert checkpoint.metadata["header"] == {"format": "pt"}


def test_weights_of_another_folder(tmp_path):
    """Sources are read shard by shard."""
    params = {NAME: quantized("int4 asymmetric"), "a.bias": np.ones(3, np.float32)}
    first = written(tmp_path / "first", params, CONFIG)
    again = {name: stored.value for name, stored in first.items()}
    second = written(tmp_path / "second", again, CONFIG)
    assert_equal_parts(loaded(value_of(second, NAME)), params[NAME])
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("first", "second")]
    assert files[0] == files[1]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    "change, match",
    [
        (lambda q: quantize(normal(6, 64), ArrayConfig(format=NF4, group_size=64), axis=1), "nf4"),
        (lambda q: dataclasses.replace(q, offset=q.scale), "has an offset, which files of"),
        (
            lambda q: dataclasses.replace(q, inputs=Inputs(multiplier=jnp.ones(64))),
            "has a multiplier of activations, which",
        ),
        (
            lambda q: dataclasses.replace(q, inputs=Inputs(permutation=jnp.arange(64))),
            "has a permutation of activations, which",
        ),
        (
            lambda q: dataclasses.replace(
                q, inputs=Inputs(rotation=BlockRotation(jnp.ones(64, jnp.int8), 8))
            ),
            "has a rotation of activations, which",
        ),
        (
            lambda q: dataclasses.replace(q, inputs=Inputs(ArrayConfig(format=NVFP4))),
            "quantizes activations to nvfp4; compressed-tensors has int8",
        ),
        (
            lambda q: dataclasses.replace(q, zero_point=q.scale),
            "has zero points in bfloat16 from .*; files have integers from -8 to 7 for int4",
        ),
        (
            lambda q: dataclasses.replace(q, scale=q.scale.astype(jnp.float8_e8m0fnu)),
            r"has scales in float8_e8m0fnu; files have float32 or float16 or bfloat16",
        ),
        (
            lambda q: dataclasses.replace(q, zero_point=jnp.full((6, 2), 8)),
            "has zero points in int32 from 8 to 8; files have integers from -8 to 7 for int4",
        ),
        (
            lambda q: dataclasses.replace(
                q, scale=q.scale[:, :1], zero_point=jnp.ones((6, 2), int)
            ),
            r"has zero points of shape \(6, 2\) and scales of shape \(6, 1\)",
        ),
        (
            lambda q: dataclasses.replace(quantized("mxfp4"), zero_point=jnp.ones((1, 1), int)),
            "has a zero point of floating-point codes, which",
        ),
        (
            lambda q: dataclasses.replace(q, scale=quantize(q.scale, ArrayConfig(format=INT8))),
            "has scales in int8; files have float32 or float16 or bfloat16",
        ),
        (
            lambda q: dataclasses.replace(q, inputs=Inputs(GROUPS, scale=jnp.ones(64))),
            r"has an input_scale of shape \(64,\); files have one for all activations",
        ),
        (
            lambda q: quantize(normal(64, 6), ArrayConfig(format=MXFP4), axis=0),
            r"has scales of shape \(2, 6\) .*; files have one per row or per group of 32 columns",
        ),
        (
            lambda q: quantize(normal(64, 6), GROUPS, axis=0),
            r"has scales of shape \(2, 6\) for shape \(64, 6\); files have one per row",
        ),
        (lambda q: quantize(normal(2, 6, 64), GROUPS, axis=2), r"must be matrices .*Unstack"),
        (lambda q: quantize(normal(0, 64), GROUPS, axis=1), r"must be .* of shape \(0, 64\)"),
    ],
)
def test_weights_that_cannot_be_written(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        write_folder(tmp_path / "model", {NAME: change(quantized("int4"))}, CONFIG)
    assert not list(tmp_path.iterdir())


def test_nvfp4_that_cannot_be_written(tmp_path):
    q = quantized("nvfp4")
    for change in [
        dataclasses.replace(q, inputs=Inputs(ArrayConfig(format=NVFP4))),
        quantize(normal(64, 6), ArrayConfig(format=NVFP4), axis=0),
        dataclasses.replace(q, scale=dataclasses.replace(q.scale, scale=jnp.ones((6, 1)))),
    ]:
        with pytest.raises(ValueError, match=r"must be in nvfp4 with e4m3 scales of shape"):
            write_folder(tmp_path / "model", {NAME: change}, CONFIG)
    params = {"a.weight": q, "b.weight": quantized("int4")}
    with pytest.raises(ValueError, match=r"one method of quantization; got NVFP4 for 'a'"):
        write_folder(tmp_path / "model", params, CONFIG)


def test_names_that_are_not_of_weights(tmp_path):
    with pytest.raises(ValueError, match=r"names such as .*; got 'up_proj' of shape \(6, 64\)"):
        write_folder(tmp_path / "model", {"up_proj": quantized("int4")}, CONFIG)
    params = {"a.weight": quantized("int4"), "a.weight_scale": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"would be written as 'a.weight_scale'; rename one"):
        write_folder(tmp_path / "model", params, CONFIG)


@pytest.mark.parametrize("name", [3, "__metadata__"])
def test_names_that_files_do_not_have(tmp_path, name):
    with pytest.raises(ValueError, match=rf"Names of parameters must be strings .*got '?{name}"):
        write_folder(tmp_path / "model", {name: jnp.ones(3)}, CONFIG)


@pytest.mark.parametrize(
    "value, match",
    [
        (jnp.ones(3, jnp.int4), "got ArrayImpl, int4"),
        (np.ones(3, np.complex128), "got ndarray, complex128"),
        ({"b": jnp.ones(3)}, "got dict, object"),
    ],
)
def test_values_that_files_do_not_have(tmp_path, value, match):
    with pytest.raises(ValueError, match=rf"a must be an array whose dtype safetensors .*{match}"):
        write_folder(tmp_path / "model", {"a": value}, CONFIG)
    assert not list(tmp_path.iterdir())


def test_arrays_in_another_byte_order(tmp_path):
    array = np.arange(3, dtype=">f4")
    checkpoint = written(tmp_path / "model", {"a": array}, CONFIG)
    np.testing.assert_array_equal(value_of(checkpoint, "a").read(), [0, 1, 2])


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization": {"bits": 4}},
        {"compression_config": {"format": "int-quantized"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    ],
)
def test_no_quantization_of_the_given_configuration_is_left(tmp_path, fields):
    checkpoint = written(tmp_path / "model", {"a.weight": jnp.ones((3, 2))}, CONFIG | fields)
    assert checkpoint.container == "safetensors"
    config = checkpoint.metadata["config"]
    assert not config.pop("text_config", {})
    assert config == CONFIG


def test_a_configuration_that_is_not_json(tmp_path):
    with pytest.raises(ValueError, match=r"config.json must be JSON \(.*\); got"):
        write_folder(tmp_path / "model", {"a": jnp.ones(3)}, {"x": jnp.ones(3)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", [["x"], "x", None])
def test_a_configuration_that_is_not_a_mapping(tmp_path, config):
    with pytest.raises(ValueError, match=r"config must be a mapping, .*; got .*Read the file with"):
        write_folder(tmp_path / "model", {"a": jnp.ones(3)}, config)
    assert not list(tmp_path.iterdir())


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("format", [INT8, FP8_E4M3, NVFP4], ids=str)
@pytest.mark.parametrize("name", ["table.weight", "table"])
def test_plain_matrices_of_8_bits_beside_quantized_weights_are_read_again(tmp_path, format, name):
    plain = {name: np.arange(-8, 8, dtype=np.int8).reshape(4, 4), "b.weight": jnp.ones((2, 3))}
    plain["c.weight"] = jnp.ones((2, 3), jnp.float8_e4m3fn)
    weight = quantize(normal(8, 32), ArrayConfig(format=format), axis=1)
    checkpoint = written(tmp_path / "model", {NAME: weight, **plain}, CONFIG)
    assert isinstance(value_of(checkpoint, NAME), jq.QTensor)
    for key, array in plain.items():
        np.testing.assert_array_equal(value_of(checkpoint, key).read(), array, strict=True)


def test_what_exists_is_not_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    assert written(tmp_path / "empty", {"a": jnp.ones(3)}, CONFIG)
    (tmp_path / "file").write_text("x")
    for name in ("empty", "file"):
        with pytest.raises(FileExistsError, match=f"{name} exists; choose a new folder"):
            write_folder(tmp_path / name, {"a": jnp.ones(3)}, CONFIG)
    assert (tmp_path / "file").read_text() == "x"
    with pytest.raises(FileNotFoundError):
        write_folder(tmp_path / "none" / "model", {"a": jnp.ones(3)}, CONFIG)


KILLED = """
import os, sys, numpy as np
from jaxquant.checkpoints import write_folder

class Params(dict):
    def items(self):
        yield "a", np.ones(3)
        os.kill(os.getpid(), 9)

write_folder(sys.argv[1], Params(), {})
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_what_a_killed_process_left_is_removed(tmp_path):
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "model"], check=False)
    assert run.returncode == -9
    assert [p.suffix for p in tmp_path.iterdir()] == [".folder"]
    write_folder(tmp_path / "model", {"a": jnp.ones(3)}, CONFIG)
    assert os.listdir(tmp_path) == ["model"]


def test_folders_that_are_being_written_are_left(tmp_path):
    def params():
        write_folder(tmp_path / "model", {"a": jnp.ones(3)}, CONFIG)
        return "b", jnp.ones(3)

    class Nested(dict):
        def items(self):
            yield params()

    with pytest.raises(OSError, match=r"not empty|exists"):
        write_folder(tmp_path / "model", Nested(), CONFIG)
    assert list(open_folder(tmp_path / "model")) == ["a"]
    assert os.listdir(tmp_path) == ["model"]
