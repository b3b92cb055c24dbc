"""Which files of a folder are read, what their tensors become, and what raises."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxquant.checkpoints import open_folder

from .folders import golden_cases, value_of, values_of, write_file, write_folder

DTYPES = [
    *(np.bool_, np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint32, np.float16),
    *(np.float32, np.float64, jnp.bfloat16),
    *(jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e8m0fnu),
]


def write_index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


def raw_file(path, entries, data):
    """A safetensors file from its header and bytes."""
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_arrays_of_every_dtype(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2, (3, 8 * 10), np.uint8)
    arrays = {}
    for dtype in DTYPES:
        data = bits.view(np.bool_) if dtype is np.bool_ else bits.view(dtype)
        arrays[np.dtype(dtype).name] = data
    arrays["scalar"] = np.float32(3).reshape(())
    arrays["empty"] = np.zeros((0, 4), np.float32)
    write_file(tmp_path / "model.safetensors", arrays, {"format": "pt"})
    checkpoint = open_folder(tmp_path)
    assert set(checkpoint) == set(arrays)
    for name, array in arrays.items():
        source = value_of(checkpoint, name)
        np.testing.assert_array_equal(source.read(), array, strict=True)
        if array.ndim and array.size:
            part = source.read((slice(1, 3), slice(2, 7)))
            np.testing.assert_array_equal(part, array[1:3, 2:7], strict=True)
    assert checkpoint.metadata["header"] == {"format": "pt"}
    assert checkpoint.container == "safetensors"


def test_what_is_read_is_a_copy(tmp_path):
    path = tmp_path / "model.safetensors"
    write_file(path, {"x": np.zeros((64, 64), np.float32)})
    read = value_of(open_folder(tmp_path), "x").read()
    with open(path, "rb+") as file:
        file.seek(-64 * 64 * 4, 2)
        file.write(b"\xff" * 64 * 64 * 4)
    assert not read.any()
    read[:] = 1


def test_floats_of_four_bits(tmp_path):
    fields = {"dtype": "F4", "shape": [2, 6], "data_offsets": [0, 6]}
    data = bytes([0x10, 0x32, 0x54, 0x76, 0xA8, 0xEF])
    raw_file(tmp_path / "model.safetensors", {"x": fields}, data)
    source = value_of(open_folder(tmp_path), "x")
    assert source.dtype == ml_dtypes.float4_e2m1fn
    expected = [[0, 0.5, 1, 1.5, 2, 3], [4, 6, 0, -1, -6, -4]]
    np.testing.assert_array_equal(source.read().astype(np.float32), expected)
    part = source.read((slice(1, 2), slice(3, 5))).astype(np.float32)
    np.testing.assert_array_equal(part, [[-1, -6]])


@pytest.mark.parametrize("dtype, shape, bits", [("F6_E2M3", [4], 6), ("F4", [2, 3], 4)])
def test_other_packed_floats_raise(tmp_path, dtype, shape, bits):
    size = int(np.prod(shape)) * bits // 8
    fields = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    raw_file(tmp_path / "model.safetensors", {"x": fields}, bytes(size))
    with pytest.raises(ValueError, match=rf"model.safetensors: tensor 'x' has dtype {dtype}"):
        open_folder(tmp_path)


def test_only_tensors_of_the_index_are_read(tmp_path):
    write_file(tmp_path / "a.safetensors", {"x": np.ones(2), "stray": np.ones(3)})
    write_file(tmp_path / "b.safetensors", {"y": np.ones(3), "x": np.zeros(2)})
    write_file(tmp_path / "c.safetensors", {"z": np.ones(4)})
    write_index(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        checkpoint = open_folder(path)
        assert list(checkpoint) == ["x", "y"]
        np.testing.assert_array_equal(value_of(checkpoint, "x").read(), np.ones(2))
    assert list(open_folder(tmp_path / "a.safetensors")) == ["stray", "x"]


def test_the_only_file_of_a_folder_is_read_whatever_its_name(tmp_path):
    write_file(tmp_path / "consolidated.safetensors", {"x": np.ones(2)})
    assert list(open_folder(tmp_path)) == ["x"]
    write_file(tmp_path / "other.safetensors", {"x": np.ones(2)})
    with pytest.raises(ValueError, match=r"must have .*; got consolidated.*Name\s+one file"):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_raise(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=rf"pickled weights, {name}.*safe_serialization=True"):
            open_folder(path)


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="got no files"):
        open_folder(tmp_path)


@pytest.mark.parametrize("file", ["../b.safetensors", "/b.safetensors", "", "b.bin", 3, None, "."])
def test_an_index_names_files_of_its_own_folder(tmp_path, file):
    write_index(tmp_path, {"x": file})
    match = r"index.json: weight_map.x must be (the name of a .safetensors file|a string).*; got"
    with pytest.raises(ValueError, match=match):
        open_folder(tmp_path)


def test_files_and_tensors_that_an_index_lists_but_that_are_missing(tmp_path):
    for name in ("a.safetensors", "\0.safetensors", "a" * 300 + ".safetensors"):
        write_index(tmp_path, {"x": name})
        with pytest.raises(ValueError, match=r"index.json lists .*not in its folder"):
            open_folder(tmp_path)
    write_file(tmp_path / "a.safetensors", {"y": np.ones(2)})
    write_index(tmp_path, {"x": "a.safetensors"})
    with pytest.raises(ValueError, match=r"a.safetensors has no tensor 'x', which model.safeten"):
        open_folder(tmp_path)
    write_index(tmp_path, {})
    with pytest.raises(ValueError, match=r"json: weight_map must be a table of tensors"):
        open_folder(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\udcff"])
def test_malformed_configurations(tmp_path, text):
    folder = write_folder(tmp_path / "model", {}, {"x": np.ones(2)})
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config.json (is not JSON|must hold an object)"):
        open_folder(folder)


def test_the_dtype_of_the_model(tmp_path):
    config, tensors = next((c, t) for _, c, t, _ in golden_cases("compressed_tensors"))
    name = "model.layer.weight"
    quantization = {"quantization_config": config["quantization_config"]}
    for own, dtype in [
        ({}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"text_config": {"torch_dtype": "float32"}}, "float32"),
    ]:
        folder = write_folder(tmp_path / "model", {**quantization, **own}, tensors)
        assert value_of(open_folder(folder), name).dtype == dtype
        assert values_of(open_folder(folder), name).dtype == dtype
    folder = write_folder(tmp_path / "model", {**quantization, "dtype": "int4"}, tensors)
    with pytest.raises(ValueError, match=r"dtype must be one of float32.*; got 'int4'"):
        open_folder(folder)


@pytest.mark.parametrize("method, advice", [("aqlm", "another format"), ("hqq", "package hqq")])
def test_methods_that_are_not_supported_raise_by_name(tmp_path, method, advice):
    config = {"quantization_config": {"quant_method": method}}
    folder = write_folder(tmp_path / "model", config, {"x": np.ones(2)})
    with pytest.raises(ValueError, match=rf"config.json: .* with '{method}' .*{advice}"):
        open_folder(folder)


def test_unknown_methods(tmp_path):
    config = {"quantization_config": {"quant_method": "new"}}
    folder = write_folder(tmp_path / "model", config, {"x": np.ones(2)})
    with pytest.raises(ValueError, match=r"quant_method must be one of compressed-.*; got 'new'"):
        open_folder(folder)


def test_parts_of_quantized_weights_without_a_configuration(tmp_path):
    folder = write_folder(tmp_path / "model", {}, {"a.weight_packed": np.ones((2, 2), np.int32)})
    with pytest.raises(ValueError, match=r"'a.weight_packed' is part of .* no configuration"):
        open_folder(folder)


def test_a_file_that_is_truncated_after_it_was_opened(tmp_path):
    write_file(tmp_path / "model.safetensors", {"x": np.ones((3000, 3))})
    source = value_of(open_folder(tmp_path), "x")
    with open(tmp_path / "model.safetensors", "rb+") as file:
        file.truncate(200)
    with pytest.raises(ValueError, match=r"model.safetensors was truncated after it was opened"):
        source.read()
