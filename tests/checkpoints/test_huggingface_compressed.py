"""compressed-tensors: layouts of older files, activations, groups of modules, and errors."""

import numpy as np
import pytest

from jaxquant import FP8_E4M3, INT8, ArrayConfig

from .folders import golden, open_model, value_of, values_of
from .models import random_scale
from .packers import bit_stream, padded_words

RNG = np.random.default_rng(0)
NAME = "model.layer.weight"
GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": True}


def config_of(weights, inputs=None, form="pack-quantized", **fields):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    fields = {"config_groups": {"group_0": group}, **fields}
    quantization = {"quant_method": "compressed-tensors", "format": form, **fields}
    return {"torch_dtype": "float32", "quantization_config": quantization}


def packed(codes, scale, bits=4, words=None, **others):
    """Tensors of a packed weight."""
    words = bit_stream(codes, bits, np.int32) if words is None else words
    tensors = {"weight_packed": words, "weight_scale": scale, **others}
    tensors["weight_shape"] = np.array(codes.shape)
    return {f"model.layer.{name}": x for name, x in tensors.items()}


def random_codes(bits, shape):
    return RNG.integers(0, 1 << bits, shape)


@pytest.mark.parametrize("bits, columns, version", [(3, 48, "0.16.1"), (5, 160, ""), (6, 48, "")])
def test_files_before_0_17_do_not_split_codes_between_words(tmp_path, bits, columns, version):
    codes, zero = random_codes(bits, (33, columns)), random_codes(bits, (33, columns // 8))
    scale = random_scale(33, columns // 8)
    config = config_of({**GROUPS, "num_bits": bits, "symmetric": False}, version=version)
    zero_words = padded_words(zero.T, bits).T
    tensors = packed(codes, scale, words=padded_words(codes, bits), weight_zero_point=zero_words)
    checkpoint = open_model(tmp_path, config, tensors)
    expected = (codes - np.repeat(zero, 8, 1)).astype(np.float32) * np.repeat(scale, 8, 1)
    np.testing.assert_array_equal(values_of(checkpoint, NAME), expected, strict=True)
    assert checkpoint[NAME].is_exact


@pytest.mark.parametrize("dtype", [np.int8, np.int32])
def test_zero_points_that_are_not_packed(tmp_path, dtype):
    codes, scale = random_codes(4, (6, 16)), random_scale(6, 2)
    zero = RNG.integers(-8, 8, (6, 2)).astype(dtype)
    tensors = packed(codes, scale, weight_zero_point=zero)
    checkpoint = open_model(tmp_path, config_of({**GROUPS, "symmetric": False}), tensors)
    expected = (codes - 8 - np.repeat(zero, 8, 1)).astype(np.float32) * np.repeat(scale, 8, 1)
    np.testing.assert_array_equal(values_of(checkpoint, NAME), expected, strict=True)
    tensors["model.layer.weight_zero_point"] = zero.astype(np.float32) + 0.5
    checkpoint = open_model(tmp_path, config_of({**GROUPS, "symmetric": False}), tensors)
    with pytest.raises(
        ValueError, match=r"weight_zero_point' must be integers .*; got \[-?\d\.5, "
    ):
        values_of(checkpoint, NAME)


def test_packed_zero_points_of_one_row_hold_one_code_in_each_word(tmp_path):
    codes, scale = random_codes(4, (1, 32)), random_scale(1, 4)
    zero = np.array([[0, 5, 9, 15]], np.int32)
    tensors = packed(codes, scale, weight_zero_point=zero)
    checkpoint = open_model(tmp_path, config_of({**GROUPS, "symmetric": False}), tensors)
    expected = (codes - np.repeat(zero, 8, 1)).astype(np.float32) * np.repeat(scale, 8, 1)
    np.testing.assert_array_equal(values_of(checkpoint, NAME), expected, strict=True)
    # Not packed, they would be read as other codes.
    tensors["model.layer.weight_zero_point"] = zero - 8
    checkpoint = open_model(tmp_path, config_of({**GROUPS, "symmetric": False}), tensors)
    match = r"weight_zero_point' must be words with one code of 4 bits each; got \[-8, -3, 1, 7\]"
    with pytest.raises(ValueError, match=match):
        values_of(checkpoint, NAME)


def test_quantized_results_are_noted(tmp_path):
    config = config_of(GROUPS)
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["output_activations"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    tensors = packed(random_codes(4, (6, 16)), random_scale(6, 2))
    checkpoint = open_model(tmp_path, config, tensors)
    assert checkpoint[NAME].note == "output_activations are left in float"
    assert not checkpoint[NAME].is_exact


def test_zero_points_of_symmetric_weights_must_be_zero(tmp_path):
    codes, scale = random_codes(4, (6, 16)), random_scale(6, 2)
    tensors = packed(codes, scale, weight_zero_point=np.zeros((6, 2), np.int8))
    checkpoint = open_model(tmp_path, config_of(GROUPS), tensors)
    assert value_of(checkpoint, NAME).zero_point is None
    expected = (codes - 8).astype(np.float32) * np.repeat(scale, 8, 1)
    np.testing.assert_array_equal(values_of(checkpoint, NAME), expected, strict=True)
    tensors["model.layer.weight_zero_point"][3, 1] = 1
    checkpoint = open_model(tmp_path, config_of(GROUPS), tensors)
    with pytest.raises(ValueError, match=r"point' must be zero everywhere.*; got \[0, 1\]"):
        values_of(checkpoint, NAME)


def test_groups_in_any_order_become_a_permutation(tmp_path):
    codes, scale = random_codes(4, (6, 32)), random_scale(6, 4)
    index = RNG.permutation(np.arange(32, dtype=np.int32) // 8)
    tensors = packed(codes, scale, weight_g_idx=index)
    checkpoint = open_model(tmp_path, config_of({**GROUPS, "actorder": "group"}), tensors)
    expected = (codes - 8).astype(np.float32) * scale[:, index]
    np.testing.assert_array_equal(values_of(checkpoint, NAME), expected, strict=True)
    value = value_of(checkpoint, NAME)
    assert np.array_equal(index[value.inputs.permutation.read()], np.arange(32) // 8)
    part = (slice(1, 3), slice(5, 21))
    np.testing.assert_array_equal(value.codes.read(part), value.codes.read()[part], strict=True)


@pytest.mark.parametrize("index", [np.arange(32) // 8, np.full(32, -1)])
def test_groups_in_order_need_no_permutation(tmp_path, index):
    codes, scale = random_codes(4, (6, 32)), random_scale(6, 4)
    tensors = packed(codes, scale, weight_g_idx=index.astype(np.int32))
    checkpoint = open_model(tmp_path, config_of({**GROUPS, "actorder": "group"}), tensors)
    assert value_of(checkpoint, NAME).inputs is None


@pytest.mark.parametrize("index", [np.zeros(32), np.arange(32) // 8 + 1, -(np.arange(32) // 8)])
def test_groups_of_other_sizes_raise(tmp_path, index):
    codes, scale = random_codes(4, (6, 32)), random_scale(6, 4)
    tensors = packed(codes, scale, weight_g_idx=index.astype(np.int32))
    with pytest.raises(ValueError, match=r"weight_g_idx' must be the group of each.*got \[ ?[01] "):
        open_model(tmp_path, config_of({**GROUPS, "actorder": "group"}), tensors)


INT8_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FP8_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize(
    "case, inputs, config",
    [
        ("int8 channel", INT8_TOKEN, ArrayConfig(format=INT8)),
        (
            "int8 channel",
            {**INT8_TOKEN, "symmetric": False},
            ArrayConfig(format=INT8, symmetric=False),
        ),
        ("fp8 tensor", FP8_TENSOR, ArrayConfig(format=FP8_E4M3, per_tensor=True)),
        (
            "fp8 ragged blocks",
            {**FP8_TENSOR, "strategy": "group", "group_size": 8, "dynamic": True},
            ArrayConfig(format=FP8_E4M3, group_size=8),
        ),
        ("fp8 ragged blocks", {**FP8_TENSOR, "strategy": "group", "group_size": 5}, None),
        ("mxfp4", INT8_TOKEN, ArrayConfig(format=INT8)),
        ("nvfp4", {"num_bits": 4, "type": "float", "dynamic": "local"}, None),
        ("int8 channel", None, None),
    ],
)
def test_activations(tmp_path, case, inputs, config):
    file, tensors, _ = golden("compressed_tensors", case)
    group = file["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = inputs
    tensors["model.layer.input_scale"] = np.full(1, 0.25, np.float32)
    value = value_of(open_model(tmp_path, file, tensors), NAME)
    assert (value.inputs and value.inputs.config) == config
    if config is not None and not inputs["dynamic"]:
        assert value.inputs.scale.shape == ()
        assert value.inputs.scale.read() == 0.25
        del tensors["model.layer.input_scale"]
        with pytest.raises(ValueError, match="has no tensor 'input_scale', but its activations"):
            open_model(tmp_path, file, tensors)


def test_static_activations_with_a_zero_point(tmp_path):
    file, tensors, _ = golden("compressed_tensors", "int8 channel")
    group = file["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = {**FP8_TENSOR, "type": "int", "symmetric": False}
    tensors["model.layer.input_scale"] = np.full(1, 0.25, np.float32)
    tensors["model.layer.input_zero_point"] = np.full(1, -7, np.int8)
    inputs = value_of(open_model(tmp_path, file, tensors), NAME).inputs
    assert (inputs.scale.read(), inputs.zero_point.read()) == (0.25, -7)
    del tensors["model.layer.input_zero_point"]
    with pytest.raises(ValueError, match="has no tensor 'input_zero_point', but its activations"):
        open_model(tmp_path, file, tensors)


def test_a_module_belongs_to_the_group_that_names_it(tmp_path):
    file, tensors, _ = golden("compressed_tensors", "int8 channel")
    others = {n.replace("layer", "q_proj"): x for n, x in tensors.items()}
    embedding = {n.replace("layer", "embed_tokens"): x for n, x in tensors.items()}
    groups = file["quantization_config"]["config_groups"]
    first = groups.pop("group_0")
    for name, target, inputs in [
        ("linear", "Linear", INT8_TOKEN),
        ("queries", r"re:.*\.q_proj$", None),
        ("embeddings", "Embedding", {**INT8_TOKEN, "symmetric": False}),
    ]:
        groups[name] = {**first, "targets": [target], "input_activations": inputs}
    found = open_model(tmp_path, file, tensors | others | embedding)
    assert value_of(found, NAME).inputs.config == ArrayConfig(format=INT8)
    assert value_of(found, "model.q_proj.weight").inputs is None
    assert not value_of(found, "model.embed_tokens.weight").inputs.config.symmetric
    del groups["linear"]
    with pytest.raises(ValueError, match=r"groups, one of which targets 'model.layer'"):
        open_model(tmp_path, file, tensors | others | embedding)


def test_stacks_of_experts(tmp_path):
    file, tensors, expected = golden("compressed_tensors", "nvfp4")
    stacked = {
        name: np.stack([x, x[::-1]]) if x.ndim > 1 else np.concatenate([x, x])
        for name, x in tensors.items()
    }
    checkpoint = open_model(tmp_path, file, stacked)
    wanted = np.stack([expected[NAME], expected[NAME][::-1]])
    np.testing.assert_array_equal(values_of(checkpoint, NAME, wanted.dtype), wanted)


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"format": "marlin-24"}, "format must be one that can be read.*got 'marlin-24'"),
        ({"format": "mxfp6-pack-quantized"}, "format must be .*got 'mxfp6-pack-quantized'"),
        (
            {"sparsity_config": {"format": "sparse-bitmask"}},
            "sparsity_config.format must be one that",
        ),
        ({"transform_config": {"config_groups": {}}}, "transform_config must be absent"),
        ({"config_groups": {}}, "config_groups must be a table with at least one group"),
        ({"config_groups": []}, "config_groups must be an object; got \\[\\]"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16 must be an object"),
        ({"config_groups": {"g": {"targets": ["Linear"]}}}, "config_groups.g.weights must be an"),
        ({"format": 3}, "quantization_config.format must be one of dense.*got 3"),
    ],
)
def test_configurations_that_are_not_supported(tmp_path, fields, match):
    file, tensors, _ = golden("compressed_tensors", "int8 channel")
    file["quantization_config"] |= fields
    with pytest.raises(ValueError, match=rf"config.json: .*{match}"):
        open_model(tmp_path, file, tensors)


@pytest.mark.parametrize(
    "case, fields, match",
    [
        ("int8 channel", {"num_bits": 9}, "weights.num_bits must be an integer from 2 to 8; got 9"),
        ("int8 channel", {"type": "float"}, "weights must be int of 8 bits, as tensor"),
        ("fp8 channel", {"num_bits": 4}, "weights must be float of 8 bits, as tensor"),
        ("int8 channel", {"symmetric": 1}, "weights.symmetric must be true or false; got 1"),
        ("int8 channel", {"symmetric": False}, "no tensor 'weight_zero_point', but symmetric"),
        ("int8 channel", {"strategy": "token"}, "strategy must be one for weights"),
        ("int8 channel", {"strategy": "tensor"}, "weight_scale' must be of shape \\(1, 1\\)"),
        ("int8 channel", {"strategy": "group"}, "group_size must be a positive integer for the"),
        ("int8 channel", {"group_size": 0}, "group_size must be a positive integer, or -1"),
        ("int8 channel", {"strategy": "block"}, "block_structure must be two integers for"),
        ("fp8 ragged blocks", {"block_structure": [8, 0]}, "block_structure must be two integers"),
        ("fp8 ragged blocks", {"block_structure": [4, 16]}, "must be of shape \\(5, 4\\)"),
        ("int8 channel", {"dynamic": "x"}, "dynamic must be true, false or \"local\"; got 'x'"),
        ("int8 channel", {"actorder": "x"}, "actorder must be one of weight, static, group"),
        ("int8 channel", {"actorder": "group"}, "has no tensor 'weight_g_idx', which actorder"),
        ("mxfp4", {"group_size": 16}, "weights.group_size must be 32; got 16"),
        ("nvfp4", {"group_size": 32}, "weights.group_size must be 16; got 32"),
    ],
)
def test_configurations_that_disagree_with_the_tensors(tmp_path, case, fields, match):
    file, tensors, _ = golden("compressed_tensors", case)
    file["quantization_config"]["config_groups"]["group_0"]["weights"] |= fields
    with pytest.raises(ValueError, match=match):
        open_model(tmp_path, file, tensors)


@pytest.mark.parametrize(
    "target, match",
    [
        ("re:(", "valid patterns"),
        ("re:(a+)+b", "none within another"),
        ("re:.*.*.*.*.*.*.*", "at most 6 repeats"),
        ("re:" + "a" * 500, "at most 500 characters"),
        (3, "targets must be a list of strings"),
    ],
)
def test_patterns_that_could_take_forever_raise(tmp_path, target, match):
    file, tensors, _ = golden("compressed_tensors", "int8 channel")
    file["quantization_config"]["config_groups"]["group_0"]["targets"] = [target]
    with pytest.raises(ValueError, match=rf"group_0.targets must be .*{match}|{match}"):
        open_model(tmp_path, file, tensors)


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("weight_packed", np.ones((6, 2), np.int64), "'.*weight_packed' must be of dtype int32"),
        ("weight_packed", np.ones((6, 3), np.int32), "must be int32 of shape \\(6, 2\\) for the"),
        ("weight_packed", np.ones((0, 2), np.int32), "must be an array of 2 or 3 axes with"),
        ("weight_packed", np.ones(6, np.int32), "must be an array of 2 or 3 axes with elements"),
        ("weight_shape", np.array([6, 17]), "must be int32 of shape \\(6, 3\\) for the weight_sh"),
        ("weight_shape", np.array([6, -1]), "for the weight_shape \\(6, -1\\)"),
        ("weight_shape", np.array([6]), "'.*weight_shape' must be int64 or int32 of shape"),
        ("weight_shape", None, "has no tensor 'model.layer.weight_shape'"),
        ("weight_scale", np.ones((6, 3), np.float32), "must be of shape \\(6, 2\\), for a weight"),
        ("weight_scale", np.ones((6, 2), np.int32), "weight_scale' must be float32 or float16"),
        ("weight_scale", None, "has no tensor 'model.layer.weight_scale'"),
        ("weight_zero_point", np.ones((5, 2), np.int32), "must be of shape \\(6, 2\\), for a"),
    ],
)
def test_tensors_that_disagree(tmp_path, name, value, match):
    codes, scale = random_codes(4, (6, 16)), random_scale(6, 2)
    zero = bit_stream(random_codes(4, (6, 2)).T, 4, np.int32).T
    tensors = packed(codes, scale, weight_zero_point=zero)
    tensors[f"model.layer.{name}"] = value
    with pytest.raises(ValueError, match=rf"model.safetensors.*{match}"):
        open_model(tmp_path, config_of({**GROUPS, "symmetric": False}), tensors)


def test_divisors_that_are_zero(tmp_path):
    file, tensors, _ = golden("compressed_tensors", "nvfp4")
    tensors["model.layer.weight_global_scale"][:] = 0
    checkpoint = open_model(tmp_path, file, tensors)
    with pytest.raises(ValueError, match=r"scale' must be finite and not zero.*; got \[0.0\]"):
        values_of(checkpoint, NAME)


def test_a_weight_cannot_be_quantized_and_in_float(tmp_path):
    codes, scale = random_codes(4, (6, 16)), random_scale(6, 2)
    tensors = packed(codes, scale) | {NAME: np.ones((6, 16), np.float32)}
    with pytest.raises(ValueError, match=f"has the weight '{NAME}' quantized and in float"):
        open_model(tmp_path, config_of(GROUPS), tensors)


def test_parts_without_a_weight(tmp_path):
    tensors = {"a.weight_zero_point": np.ones((6, 16), np.int8)}
    with pytest.raises(ValueError, match=r"'a.weight_zero_point' is part of .* rest of which is"):
        open_model(tmp_path, config_of(GROUPS), tensors)


def test_codes_without_a_scale(tmp_path):
    file, tensors, _ = golden("compressed_tensors", "fp8 channel")
    del tensors["model.layer.weight_scale"]
    with pytest.raises(ValueError, match=r"'model.layer.weight' has float8_e4m3fn elements"):
        open_model(tmp_path, file, tensors)
