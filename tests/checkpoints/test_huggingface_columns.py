"""AutoAWQ and AutoGPTQ: layouts by packers in NumPy, versions, orders of groups, and errors."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.checkpoints import open_folder

from .folders import value_of, values_of, write_file, write_folder
from .models import AWQ, RNG, G, K, N, awq_model, gptq_config, gptq_model, open_quantized


def test_awq(tmp_path):
    tensors, expected = awq_model()
    checkpoint = open_quantized(tmp_path, AWQ, tensors)
    stored = checkpoint["a.q_proj.weight"]
    np.testing.assert_array_equal(values_of(checkpoint, stored.name), expected, strict=True)
    assert stored.is_exact
    assert stored.shape == (N, K)
    assert value_of(checkpoint, stored.name).order == (-1, -2)
    assert str(value_of(checkpoint, stored.name).format) == "int4"
    assert set(checkpoint) == {"a.q_proj.weight", "a.q_proj.bias"}


def test_awq_with_one_group_and_older_names_of_fields(tmp_path):
    tensors, _ = awq_model()
    tensors["a.q_proj.qzeros"] = tensors["a.q_proj.qzeros"][:1]
    tensors["a.q_proj.scales"] = tensors["a.q_proj.scales"][:1]
    fields = {"quant_method": "awq", "w_bit": 4, "q_group_size": -1}
    value = value_of(open_quantized(tmp_path, fields, tensors), "a.q_proj.weight")
    assert value.scale.shape == value.zero_point.shape == (1, N)


@pytest.mark.parametrize("minus, form", [(1, "gptq"), (0, "gptq_v2")])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_with_zero_points(tmp_path, bits, minus, form):
    tensors, expected = gptq_model(bits, minus)
    checkpoint = open_quantized(tmp_path, gptq_config(bits, checkpoint_format=form), tensors)
    name = "a.q_proj.weight"
    np.testing.assert_array_equal(values_of(checkpoint, name), expected, strict=True)
    assert checkpoint[name].shape == (N, K)
    value = value_of(checkpoint, name)
    assert value.inputs is None
    part = (slice(3, 29), slice(2, 13))
    np.testing.assert_array_equal(value.codes.read(part), value.codes.read()[part], strict=True)
    part = (slice(1, 3), slice(2, 13))
    np.testing.assert_array_equal(value.zero_point.read(part), value.zero_point.read()[part])


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("minus", [0, 1])
def test_symmetric_gptq_needs_no_zero_points_whatever_its_label_says(tmp_path, minus, form):
    tensors, expected = gptq_model(minus=minus, zero=8)
    checkpoint = open_quantized(tmp_path, gptq_config(sym=True, checkpoint_format=form), tensors)
    assert value_of(checkpoint, "a.q_proj.weight").zero_point is None
    got = values_of(checkpoint, "a.q_proj.weight")
    np.testing.assert_array_equal(got, expected, strict=True)


def test_symmetric_gptq_with_other_zero_points(tmp_path):
    tensors, _ = gptq_model(zero=8)
    tensors["a.q_proj.qzeros"][2, 1] += 1
    checkpoint = open_quantized(tmp_path, gptq_config(sym=True), tensors)
    codes = value_of(checkpoint, "a.q_proj.weight").codes
    codes.read((slice(0, 16), slice(0, 16)))
    with pytest.raises(ValueError, match=r"qzeros' must be 7 .* or 8 .*; got \[7, 8\]"):
        codes.read((slice(17, 18), slice(8, 16)))


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_gptq_with_groups_in_any_order(tmp_path, is_symmetric):
    groups = RNG.permutation(np.arange(K) // G)
    tensors, expected = gptq_model(zero=8 if is_symmetric else None, groups=groups)
    config = gptq_config(desc_act=True, sym=is_symmetric)
    checkpoint = open_quantized(tmp_path, config, tensors)
    got = values_of(checkpoint, "a.q_proj.weight")
    np.testing.assert_array_equal(got, expected, strict=True)
    value = value_of(checkpoint, "a.q_proj.weight")
    permutation = value.inputs.permutation.read()
    np.testing.assert_array_equal(groups[permutation], np.arange(K) // G)
    whole = value.codes.read()
    for rows in (slice(k, k + G) for k in range(0, K, G)):
        part = (rows, slice(2, 13))
        np.testing.assert_array_equal(value.codes.read(part), whole[part], strict=True)
    del tensors["a.q_proj.g_idx"]
    with pytest.raises(ValueError, match=r"has no tensor 'g_idx', which desc_act needs"):
        open_quantized(tmp_path, config, tensors)


def test_gptq_with_settings_of_single_modules(tmp_path):
    tensors, expected = gptq_model(8)
    dynamic = {"-:lm_head": {}, r"+:.*\.q_proj": {"bits": 8, "sym": None}, ".*": {"bits": 2}}
    checkpoint = open_quantized(tmp_path, gptq_config(4, dynamic=dynamic), tensors)
    got = values_of(checkpoint, "a.q_proj.weight")
    np.testing.assert_array_equal(got, expected, strict=True)
    with pytest.raises(ValueError, match=r"config.json: .*dynamic must be .* none within another"):
        open_quantized(tmp_path, gptq_config(dynamic={"(a+)+": {}}), tensors)


def test_gptq_with_the_configuration_in_a_file_of_its_own(tmp_path):
    tensors, expected = gptq_model()
    folder = write_folder(tmp_path / "model", {"torch_dtype": "float32"}, tensors)
    text = '{"bits": 4, "group_size": 8, "desc_act": false, "sym": false}'
    (folder / "quantize_config.json").write_text(text)
    for path in (folder, folder / "model.safetensors"):
        got = values_of(open_folder(path), "a.q_proj.weight", jnp.float32)
        np.testing.assert_array_equal(got, expected, strict=True)
    assert open_folder(folder).container == "gptq"


def test_without_a_configuration(tmp_path):
    tensors, _ = gptq_model()
    write_file(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"'a.q_proj.q[a-z]*' is part of .* no configuration says"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"bits": 5}, r"bits must be one of 2, 3, 4, 8; got 5"),
        ({"bits": 8}, r"g_idx' must be int32 or int64 of shape \(16,\)"),
        ({"bits": None}, r"bits must be an integer from 2 to 8; got None"),
        ({"group_size": 0}, r"group_size must be a positive integer, or -1"),
        ({"group_size": 16}, r"g_idx' must be the group of each column, with 16 columns"),
        ({"sym": "no"}, r"sym must be true or false; got 'no'"),
        ({"checkpoint_format": "marlin"}, r"checkpoint_format must be one of gptq, gptq_v2; got"),
        ({"is_marlin_format": True}, r"is_marlin_format must be false"),
        ({"dynamic": []}, r"dynamic must be an object"),
    ],
)
def test_gptq_settings_that_raise(tmp_path, fields, match):
    tensors, _ = gptq_model()
    with pytest.raises(ValueError, match=match):
        open_quantized(tmp_path, gptq_config(**fields), tensors)


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"bits": 8}, r"bits must be an integer from 4 to 4; got 8"),
        ({"version": "gemv"}, r"version must be one of gemm, GEMM; got 'gemv'"),
        ({"checkpoint_format": "exllama"}, r"checkpoint_format must be one of gemm, GEMM"),
        ({"zero_point": False}, r"zero_point must be true, as AutoAWQ's version gemm has it"),
        ({"group_size": 16}, r"scales' must be of shape \(2, 16\), for a weight of shape"),
        ({"group_size": None}, r"group_size must be an integer from -1"),
    ],
)
def test_awq_settings_that_raise(tmp_path, fields, match):
    tensors, _ = awq_model()
    with pytest.raises(ValueError, match=match):
        open_quantized(tmp_path, {**AWQ, **fields}, tensors)


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("qweight", np.ones((K, 2), np.int64), r"qweight' must be int32 or uint32; got int64"),
        ("qweight", np.ones((0, 2), np.int32), r"qweight' must be an array of 2 axes with elem"),
        ("qzeros", np.ones((3, 2), np.int32), r"qzeros' must be int32 or uint32 of shape \(4, 2"),
        ("qzeros", None, r"has no tensor 'a.q_proj.qzeros'"),
        ("scales", np.ones((4, 15), np.float16), r"scales' must be of shape \(4, 16\), for a"),
        ("scales", np.ones((4, 16), np.int8), r"scales' must be float32 or float16 or bfloat16"),
        ("scales", None, r"has no tensor 'a.q_proj.scales'"),
    ],
)
@pytest.mark.parametrize("model", [awq_model, gptq_model])
def test_tensors_that_disagree(tmp_path, model, name, value, match):
    tensors, _ = model()
    tensors = {**tensors, f"a.q_proj.{name}": value}
    config = AWQ if model is awq_model else gptq_config()
    with pytest.raises(ValueError, match=f"model.safetensors.*{match}"):
        open_quantized(tmp_path, config, tensors)
