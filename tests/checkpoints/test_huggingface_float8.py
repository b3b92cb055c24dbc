"""FP8 of DeepSeek and others, fbgemm, gpt-oss and ModelOpt: layouts, activations, errors."""

import numpy as np
import pytest

from jaxquant import FP8_E4M3, INT8, MXFP8, ArrayConfig
from jaxquant.checkpoints import open_folder

from .folders import golden_cases, open_model, value_of, values_of, write_folder
from .models import (
    config_of,
    float8,
    modelopt_config,
    modelopt_model,
    open_quantized,
    random_scale,
)

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 16]}
NAME = "a.weight"


@pytest.mark.parametrize("shape, grid", [((20, 40), (5, 5)), ((18, 16), (9, 1)), ((3, 7), (1, 1))])
def test_ragged_blocks_are_refined(tmp_path, shape, grid):
    codes = float8(*shape)
    scale = random_scale(-(-shape[0] // 8), -(-shape[1] // 16))
    checkpoint = open_quantized(tmp_path, FP8, {NAME: codes, "a.weight_scale_inv": scale})
    rows, columns = (np.arange(n) // b for n, b in zip(shape, (8, 16), strict=True))
    expected = codes.astype(np.float32) * scale[rows][:, columns]
    np.testing.assert_array_equal(values_of(checkpoint, NAME), expected, strict=True)
    value = value_of(checkpoint, NAME)
    assert value.scale.shape == grid
    for part in [(slice(1, 3), slice(0, grid[1])), (slice(grid[0], grid[0]), slice(0, 1))]:
        np.testing.assert_array_equal(value.scale.read(part), value.scale.read()[part])


def test_the_ragged_blocks_of_deepseek(tmp_path):
    """kv_a_proj_with_mqa has 576 rows in blocks of 128."""
    codes, scale = float8(576, 256), random_scale(5, 2)
    config = {**FP8, "weight_block_size": [128, 128]}
    checkpoint = open_quantized(tmp_path, config, {NAME: codes, "a.weight_scale_inv": scale})
    assert value_of(checkpoint, NAME).scale.shape == (9, 2)
    expected = codes.astype(np.float32) * np.repeat(np.repeat(scale, 128, 0)[:576], 128, 1)
    np.testing.assert_array_equal(values_of(checkpoint, NAME), expected, strict=True)
    assert value_of(checkpoint, NAME).inputs.config == ArrayConfig(format=FP8_E4M3, group_size=128)


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_scales_of_rows_in_a_model_of_blocks(tmp_path, shape):
    """One row of blocks of 8 x 16 has as many scales as the 5 rows of this weight."""
    codes, scale = float8(5, 80), random_scale(5)
    tensors = {NAME: codes, "a.weight_scale_inv": scale.reshape(shape)}
    checkpoint = open_quantized(tmp_path, FP8, tensors)
    expected = codes.astype(np.float32) * scale[:, None]
    np.testing.assert_array_equal(values_of(checkpoint, NAME), expected, strict=True)
    checkpoint = open_quantized(tmp_path, FP8, {**tensors, "a.weight_scale_inv": scale[None]})
    expected = codes.astype(np.float32) * np.repeat(scale, 16)
    np.testing.assert_array_equal(values_of(checkpoint, NAME), expected, strict=True)


def test_stacks_of_experts(tmp_path):
    codes, scale = float8(3, 16, 32), random_scale(3, 2, 2)
    tensors = {"a.gate_up_proj": codes, "a.gate_up_proj_scale_inv": scale}
    checkpoint = open_quantized(tmp_path, FP8, tensors)
    expected = codes.astype(np.float32) * np.repeat(np.repeat(scale, 8, 1), 16, 2)
    np.testing.assert_array_equal(values_of(checkpoint, "a.gate_up_proj"), expected, strict=True)


@pytest.mark.parametrize(
    "scale, extra, scheme, config, static",
    [
        (random_scale(2, 2), {}, "dynamic", ArrayConfig(format=FP8_E4M3, group_size=16), None),
        (random_scale(16), {}, "dynamic", ArrayConfig(format=FP8_E4M3), None),
        (np.full((16, 1), 127, np.uint8), {}, "dynamic", ArrayConfig(format=MXFP8), None),
        (
            random_scale(),
            {"a.input_scale": np.float32(0.5)},
            "static",
            ArrayConfig(format=FP8_E4M3, per_tensor=True),
            0.5,
        ),
    ],
)
def test_activations(tmp_path, scale, extra, scheme, config, static):
    tensors = {NAME: float8(16, 32), "a.weight_scale_inv": scale, **extra}
    inputs = value_of(
        open_quantized(tmp_path, {**FP8, "activation_scheme": scheme}, tensors), NAME
    ).inputs
    assert inputs.config == config
    assert (inputs.scale and inputs.scale.read()) == static
    if scheme == "static":
        del tensors["a.input_scale"]
        with pytest.raises(ValueError, match=r"no tensor 'input_scale', but activation_scheme"):
            open_quantized(tmp_path, {**FP8, "activation_scheme": scheme}, tensors)


@pytest.mark.parametrize("is_moved", [False, True])
def test_fbgemm(tmp_path, is_moved):
    codes, scale = float8(8, 16), random_scale(8, 1)
    experts, columns = float8(2, 16, 12), random_scale(2, 1, 12)
    tensors = {
        NAME: codes,
        "a.weight_scale": scale,
        "a.down_proj": experts,
        "a.down_proj_scale": columns.swapaxes(1, 2) if is_moved else columns,
    }
    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    checkpoint = open_quantized(tmp_path, config, tensors)
    got = values_of(checkpoint, NAME)
    np.testing.assert_array_equal(got, codes.astype(np.float32) * scale, strict=True)
    got = values_of(checkpoint, "a.down_proj")
    np.testing.assert_array_equal(got, experts.astype(np.float32) * columns, strict=True)
    assert value_of(checkpoint, NAME).inputs.config == ArrayConfig(format=FP8_E4M3)
    part = (slice(0, 1), slice(0, 1), slice(3, 7))
    scale = value_of(checkpoint, "a.down_proj").scale
    np.testing.assert_array_equal(scale.read(part), columns[part])


@pytest.mark.parametrize(
    "fields, tensors, match",
    [
        ({"fmt": "e5m2"}, {}, r"fmt must be one of e4m3.*; got 'e5m2'"),
        ({"activation_scheme": "x"}, {}, r"activation_scheme must be one of dynamic, static"),
        ({"weight_block_size": [8, -1]}, {}, r"weight_block_size must be two integers from 1 "),
        ({}, {"a.weight_scale_inv": random_scale(3, 2)}, r"must be of shape \(2, 2\) or \(1, 1\)"),
        ({}, {"a.scale": random_scale(2, 2)}, r"needs one tensor .*got \['weight_scale_inv', 'sc"),
        ({}, {"a.weight_scale_inv": np.ones((2, 2), np.int32)}, r"must be float32 or float16 or"),
        ({}, {NAME: np.ones((16, 32), np.int8)}, r"scale_inv' must be uint8 or float8_e8m0fnu"),
        ({}, {"b.weight": float8(4, 4)}, r"b.weight' needs one tensor b.weight_scale_inv or b."),
        ({}, {"b.weight_scale_inv": random_scale(2, 2)}, r"'b.weight_scale_inv' is part of a qu"),
    ],
)
def test_fp8_that_is_malformed(tmp_path, fields, tensors, match):
    tensors = {NAME: float8(16, 32), "a.weight_scale_inv": random_scale(2, 2), **tensors}
    with pytest.raises(ValueError, match=match):
        open_quantized(tmp_path, {**FP8, **fields}, tensors)


def test_experts_of_gpt_oss_keep_the_shape_of_the_model(tmp_path):
    _, config, tensors, expected = next(golden_cases("gpt_oss"))
    checkpoint = open_model(tmp_path, config, tensors)
    ((name, wanted),) = expected.items()
    value = value_of(checkpoint, name)
    assert value.shape == wanted.shape == (2, 96, 6)
    assert value.codes.shape == (2, 6, 96)
    part = (slice(1, 2), slice(2, 5), slice(33, 70))
    np.testing.assert_array_equal(value.codes.read(part), value.codes.read()[part])


@pytest.mark.parametrize(
    "suffix, value, match",
    [
        ("blocks", np.ones((2, 6, 3, 8), np.uint8), r"blocks' must be uint8 of shape \(experts"),
        ("blocks", np.ones((2, 6, 3, 16), np.int8), r"blocks' must be uint8; got int8"),
        ("blocks", None, r"scales' is part of a quantized weight, the rest of which is missing"),
        ("scales", np.ones((2, 6, 4), np.uint8), r"scales' must be of shape \(2, 6, 3\), one for"),
        ("scales", np.ones((2, 6, 3), np.int8), r"scales' must be uint8 or float8_e8m0fnu; got"),
        ("scales", None, r"has no tensor 'model.layers.0.mlp.experts.gate_up_proj_scales'"),
    ],
)
def test_experts_of_gpt_oss_that_are_malformed(tmp_path, suffix, value, match):
    _, config, tensors, _ = next(golden_cases("gpt_oss"))
    tensors = {**tensors, f"model.layers.0.mlp.experts.gate_up_proj_{suffix}": value}
    with pytest.raises(ValueError, match=match):
        open_model(tmp_path, config, tensors)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    "algorithm, inputs",
    [
        ("NVFP4", None),
        ("FP8", ArrayConfig(format=FP8_E4M3, per_tensor=True)),
        ("FP8_PER_CHANNEL_PER_TOKEN", ArrayConfig(format=FP8_E4M3)),
        ("MXFP8", ArrayConfig(format=MXFP8)),
        ("W4A16_AWQ", None),
        ("W8A8_SQ_PER_CHANNEL", ArrayConfig(format=INT8)),
    ],
)
@pytest.mark.parametrize("is_mixed", [False, True])
def test_modelopt(tmp_path, algorithm, inputs, is_mixed):
    tensors, expected = modelopt_model(algorithm)
    config = modelopt_config("MIXED_PRECISION" if is_mixed else algorithm)
    folder = write_folder(tmp_path / "model", config_of(config), tensors)
    if is_mixed:
        write_folder(folder, {"torch_dtype": "float32"}, tensors)
        text = '{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "%s"}}'
        (folder / "hf_quant_config.json").write_text(text % "MIXED_PRECISION")
    checkpoint = open_folder(folder)
    np.testing.assert_array_equal(values_of(checkpoint, NAME), expected, strict=True)
    assert checkpoint[NAME].is_exact
    found = value_of(checkpoint, NAME).inputs
    assert (found and found.config) == inputs
    if "a.pre_quant_scale" in tensors:
        np.testing.assert_array_equal(found.multiplier.read(), tensors["a.pre_quant_scale"])
    if algorithm == "FP8":
        assert found.scale.read() == 0.5


@pytest.mark.parametrize(
    "algorithm, name, value, match",
    [
        ("NVFP4", "weight_scale_2", None, r"must be a weight in nvfp4 for quant_algo NVFP4"),
        ("NVFP4", "weight_scale_2", np.ones(2, np.float32), r"weight_scale_2' must be one factor"),
        ("NVFP4", "weight_scale", np.ones((8, 4), np.float16), r"weight_scale' must be float8_e4"),
        ("NVFP4", "pre_quant_scale", np.ones(63, np.float32), r"pre_quant_scale' must be .*\(64,"),
        ("FP8", "weight_scale", np.ones(7, np.float32), r"weight_scale' must be of shape \(8, 1"),
        ("FP8", "weight_scale", None, r"'a.weight' has float8_e4m3fn elements, as if it were"),
        ("FP8", "input_scale", np.ones(2, np.float32), r"input_scale' must be one element; got"),
        ("MXFP8", "weight_scale", np.ones((8, 3), np.uint8), r"weight_scale' must be of shape"),
        ("W4A16_AWQ", "weight_scale", np.ones((8, 5), np.float32), r"must be one scale per group"),
        ("FP8", "weight", np.ones((8, 64), np.int8), r"must be a weight in fp8_e4m3 for quant"),
    ],
)
def test_modelopt_tensors_that_disagree(tmp_path, algorithm, name, value, match):
    tensors, _ = modelopt_model(algorithm)
    tensors = {**tensors, f"a.{name}": value}
    with pytest.raises(ValueError, match=match):
        open_quantized(tmp_path, modelopt_config(algorithm), tensors)


@pytest.mark.parametrize("algorithm", ["NVFP4_SVD", "W4A8_AWQ", None, 3])
def test_algorithms_of_modelopt_that_are_not_supported(tmp_path, algorithm):
    tensors, _ = modelopt_model("FP8")
    with pytest.raises(ValueError, match=rf"quant_algo must be one of FP8, .*got .*{algorithm}"):
        open_quantized(tmp_path, modelopt_config(algorithm), tensors)


def test_static_activations_of_int8(tmp_path):
    tensors, _ = modelopt_model("W8A8_SQ_PER_CHANNEL")
    tensors |= {"a.input_scale": np.float32(0.5), "a.pre_quant_scale": np.ones(64, np.float32)}
    config = modelopt_config("W8A8_SQ_PER_CHANNEL")
    inputs = value_of(open_quantized(tmp_path, config, tensors), NAME).inputs
    assert inputs.config == ArrayConfig(format=INT8, per_tensor=True)
    assert inputs.scale.read() == 0.5
    assert inputs.multiplier.shape == (64,)


def test_stacks_with_one_factor_for_each_expert(tmp_path):
    tensors, _ = modelopt_model("NVFP4")
    tensors = {n: np.stack([x, x]) for n, x in tensors.items() if "pre_quant" not in n}
    tensors["a.weight_scale_2"] = np.array([0.5, 0.25], np.float32)
    tensors["a.input_scale"] = np.ones(2, np.float32)
    got = values_of(open_quantized(tmp_path, modelopt_config("NVFP4"), tensors), NAME)
    np.testing.assert_array_equal(got[0], 2 * got[1])
    assert np.ptp(got)
