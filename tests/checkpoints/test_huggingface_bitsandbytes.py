"""bitsandbytes and MLX: slices, single files, settings of modules, and errors."""

import json

import numpy as np
import pytest

from jaxquant.checkpoints import open_folder

from .folders import golden, loaded, open_model, value_of, values_of, write_file

NAME = "layer.weight"


@pytest.mark.parametrize(
    "case, grid",
    [
        ("nf4 128 columns", (6, 2)),
        ("nf4 nested 96 columns", (6, 3)),
        ("fp4 nested 128 columns", (5, 2)),
        ("fp4 100 columns", (4, 25)),
    ],
)
def test_slices_of_flat_blocks(tmp_path, case, grid):
    """Blocks of 64 run over the flat weight; 96 and 100 columns share blocks between rows."""
    value = value_of(open_model(tmp_path, *golden("bitsandbytes", case)[:2]), NAME)
    assert value.scale.shape == grid
    for source in (value.codes, value.scale):
        whole = source.read()
        for part in [
            (slice(1, 3), slice(1, 2)),
            (slice(2, 4), slice(0, grid[1])),
            (slice(2, 2), slice(0, 1)),
        ]:
            np.testing.assert_array_equal(source.read(part), whole[part], strict=True)


def test_a_file_without_a_configuration_says_how_it_is_stored(tmp_path):
    _, tensors, expected = golden("bitsandbytes", "nf4 128 columns")
    write_file(tmp_path / "a.safetensors", tensors)
    checkpoint = open_folder(tmp_path / "a.safetensors")
    assert checkpoint.container == "bitsandbytes"
    np.testing.assert_array_equal(values_of(checkpoint, NAME), expected[NAME], strict=True)


def state_with(**fields):
    def change(tensors):
        (name,) = (n for n in tensors if "quant_state" in n)
        state = {**json.loads(tensors[name].tobytes()), **fields}
        tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return change


def tensor_with(name, value):
    def change(tensors):
        tensors[name] = value(tensors[name]) if callable(value) else value

    return change


STATE = "layer.weight.quant_state.bitsandbytes__nf4"


def test_slices_of_nested_scales(tmp_path):
    config, tensors, _ = golden("bitsandbytes", "nf4 nested 96 columns")
    state_with(nested_blocksize=2, nested_offset=0.5)(tensors)
    outer = np.arange(1, 6, dtype=np.float32)
    tensors["layer.weight.nested_absmax"] = outer
    table = tensors["layer.weight.nested_quant_map"]
    absmax = table[tensors["layer.weight.absmax"]] * np.repeat(outer, 2)[:9] + np.float32(0.5)
    scale = value_of(open_model(tmp_path, config, tensors), NAME).scale
    # Blocks of 64 elements, in steps of 32.
    expected = np.repeat(absmax, 2).reshape(6, 3)
    for part in [
        (slice(0, 6), slice(0, 3)),
        (slice(4, 6), slice(1, 3)),
        (slice(5, 6), slice(2, 3)),
    ]:
        np.testing.assert_array_equal(scale.read(part), expected[part], strict=True)


@pytest.mark.parametrize(
    "change, match",
    [
        (state_with(quant_type="int4"), r"__nf4.quant_type must be one of nf4, fp4; got 'int4'"),
        (state_with(quant_type="fp4"), r"quant_map' must be the values 0.0000, 0.0052"),
        (state_with(blocksize=0), r"__nf4.blocksize must be an integer from 1"),
        (state_with(blocksize=32), r"absmax' must be float32 or uint8 of shape \(18,\)"),
        (state_with(shape=[2, 3, 96]), r"shape must be two integers from 1 .*got \[2, 3, 96\]"),
        (state_with(shape=[64, 9]), r"shape must be two integers, the second of them even; got"),
        (state_with(shape=[2**41, 2]), r"shape must be two integers from 1 to 2147483648"),
        (state_with(shape=[6, 98]), r"layer.weight' must be uint8 of shape \(294, 1\)"),
        (state_with(dtype="int8"), r"dtype must be one of float32, float16, bfloat16"),
        (state_with(nested_blocksize=None), r"nested_blocksize must be an integer from 1"),
        (state_with(nested_offset="x"), r"nested_offset must be a finite number; got 'x'"),
        (state_with(nested_offset=float("inf")), r"nested_offset must be a finite number"),
        (tensor_with(STATE, np.zeros(3, np.uint8)), r"__nf4' is not JSON"),
        (
            tensor_with("layer.weight.quant_map", lambda x: x + 1),
            r"the values .*, 2.0000\.",
        ),
        (tensor_with("layer.weight.absmax", lambda x: x[1:]), r"absmax' must be float32 or uint8"),
        (tensor_with("layer.weight.nested_absmax", lambda x: x[:0]), r"nested_absmax' must be fl"),
        (tensor_with("layer.weight.nested_quant_map", lambda x: x[1:]), r"nested_quant_map' must"),
        (tensor_with("layer.weight", lambda x: x[1:]), r"layer.weight' must be uint8 of shape"),
    ],
)
def test_bitsandbytes_that_is_malformed(tmp_path, change, match):
    config, tensors, _ = golden("bitsandbytes", "nf4 nested 96 columns")
    change(tensors)
    with pytest.raises(ValueError, match=match):
        open_model(tmp_path, config, tensors)


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("layer.SCB", lambda x: x[1:], r"SCB' must be float32 or float16 or bfloat16 of shape"),
        ("layer.SCB", None, r"'layer.weight' has int8 elements, as if it were part"),
        ("layer.weight", None, r"has no tensor 'layer.weight'"),
        ("layer.weight", lambda x: x.view(np.uint8), r"layer.weight' must be int8; got uint8"),
        ("layer.weight_format", lambda x: x + 1, r'must be 0, the format "row".*; got 1\.'),
    ],
)
def test_int8_of_bitsandbytes_that_is_malformed(tmp_path, name, value, match):
    config, tensors, _ = golden("bitsandbytes", "int8")
    tensors[name] = value(tensors[name]) if value else None
    with pytest.raises(ValueError, match=match):
        open_model(tmp_path, config, tensors)


def test_mlx_with_settings_of_single_modules(tmp_path):
    config, tensors, expected = golden("mlx", "affine 4 bits")
    config["quantization"]["bits"] = 8
    with pytest.raises(ValueError, match=r"scales' must be of shape \(4, 2\), for a weight"):
        open_model(tmp_path, config, tensors)
    config["quantization"] |= {"layer": {"group_size": 32, "bits": 4}, "other": False}
    got = values_of(open_model(tmp_path, config, tensors), NAME)
    np.testing.assert_array_equal(got, expected[NAME], strict=True)


def test_mlx_with_affine_modules_in_a_model_of_another_mode(tmp_path):
    """Settings of the routers of gpt-oss do not name their mode, which is affine."""
    config, tensors, expected = golden("mlx", "mxfp4 4 bits")
    _, router, of_router = golden("mlx", "affine 8 bits")
    tensors |= {name.replace("layer", "router"): x for name, x in router.items()}
    config["quantization"]["router"] = {"group_size": 32, "bits": 8}
    checkpoint = open_model(tmp_path, config, tensors)
    np.testing.assert_array_equal(values_of(checkpoint, NAME), expected[NAME], strict=True)
    got = values_of(checkpoint, "router.weight")
    np.testing.assert_array_equal(got, of_router[NAME], strict=True)


def test_mlx_says_that_it_rounds_otherwise(tmp_path):
    config, tensors, _ = golden("mlx", "affine 4 bits")
    stored = open_model(tmp_path, config, tensors)[NAME]
    assert stored.note == "MLX multiplies and adds in bfloat16; here, both are done in float32"
    tensors = {
        n: x.astype(np.float32) if x.ndim and "weight" not in n else x for n, x in tensors.items()
    }
    assert open_model(tmp_path, config, tensors)[NAME].is_exact


def test_metal_of_transformers_names_offsets_otherwise(tmp_path):
    config, tensors, expected = golden("mlx", "affine 4 bits")
    config["quantization_config"] = {**config.pop("quantization"), "quant_method": "metal"}
    tensors["layer.qbiases"] = tensors.pop("layer.biases")
    checkpoint = open_model(tmp_path, config, tensors)
    np.testing.assert_array_equal(values_of(checkpoint, NAME), expected[NAME], strict=True)
    assert loaded(checkpoint[NAME].value).offset.shape == (4, 4)


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"bits": 7}, r"quantization.bits must be one of 2, 3, 4, 5, 6, 8; got 7"),
        ({"bits": 9}, r"quantization.bits must be an integer from 2 to 8; got 9"),
        ({"group_size": 0}, r"quantization.group_size must be an integer from 1"),
        ({"group_size": 64}, r"scales' must be of shape \(4, 2\)"),
        ({"mode": "x"}, r"quantization.mode must be one of affine, mxfp4, mxfp8, nvfp4; got 'x'"),
        ({"mode": "mxfp4"}, r"scales' must be uint8; got bfloat16"),
        ({"mode": "nvfp4"}, r"mode must be affine, unless group_size is 16 and bits is 4"),
    ],
)
def test_mlx_settings_that_disagree(tmp_path, fields, match):
    config, tensors, _ = golden("mlx", "affine 4 bits")
    config["quantization"] |= fields
    with pytest.raises(ValueError, match=match):
        open_model(tmp_path, config, tensors)


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("layer.weight", lambda x: x.view(np.int32), r"layer.weight' must be uint32; got int32"),
        ("layer.weight", None, r"has no tensor 'layer.weight'"),
        ("layer.scales", None, r"'layer.weight' has uint32 elements, as if it were part"),
        ("layer.biases", None, r"has no tensor 'layer.biases'"),
        ("layer.biases", lambda x: x[1:], r"biases' must be float32 or .* of shape \(4, 4\)"),
    ],
)
def test_mlx_tensors_that_disagree(tmp_path, name, value, match):
    config, tensors, _ = golden("mlx", "affine 4 bits")
    tensors[name] = value(tensors[name]) if value else None
    with pytest.raises(ValueError, match=match):
        open_model(tmp_path, config, tensors)


def test_mlx_without_a_configuration(tmp_path):
    _, tensors, _ = golden("mlx", "affine 4 bits")
    write_file(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"'layer.weight' has uint32 .* but no configuration"):
        open_folder(tmp_path)
