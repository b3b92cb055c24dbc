"""`open` recognises a checkpoint by its contents."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxquant as jq

from .gguf_files import STRING, gguf

W = np.arange(64, dtype=np.float32).reshape(2, 32)


def test_each_kind_is_recognised(tmp_path):
    (tmp_path / "a").write_bytes(gguf([], [("w", (2, 32), 0, W.tobytes())]))
    jq.save(tmp_path / "b", {"w": jnp.asarray(W)})
    safetensors.numpy.save_file({"w": W}, tmp_path / "c")
    folder = tmp_path / "folder"
    folder.mkdir()
    safetensors.numpy.save_file({"w": W}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    index = {"metadata": {}, "weight_map": {"w": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    kinds = {}
    for path in ("a", "b", "c", "folder", "folder/model.safetensors.index.json"):
        found = jq.checkpoints.open(tmp_path / path)
        np.testing.assert_array_equal(found.load(["w"])["w"], W)
        kinds[path] = found.is_tree
    assert kinds.pop("b")
    assert not any(kinds.values())


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("model.keras", b"PK\x03\x04", "is not read here: open it with keras.models.load_model"),
        ("pytorch_model.bin", b"PK\x03\x04", "may hold pickled objects, which can run code"),
        ("old.pt", b"\x80\x02}q", "may hold pickled objects, which can run code"),
        (
            "text.txt",
            b"Once upon a time",
            "is not a checkpoint: it starts with b'Once upon'. Name a safetensors or GGUF file,",
        ),
        ("empty", b"", "is not a checkpoint: it is empty. Name a safetensors or GGUF file, or"),
        ("short", b"\x80\0\0\0\0\0\0\0{", "is truncated: it has 9 bytes, but its header says 136"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, name, data, text):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} .*{text}"):
        jq.checkpoints.open(tmp_path / name)


# The last is how JSON starts.
@pytest.mark.parametrize("length", [0x280, int.from_bytes(b"PK", "little"), 0x7B])
def test_any_length_of_the_header_is_safetensors(tmp_path, length):
    entry = {"w": {"dtype": "F32", "shape": [2, 32], "data_offsets": [0, W.nbytes]}}
    header = json.dumps(entry).encode().ljust(length)
    data = length.to_bytes(8, "little") + header + W.tobytes()
    (tmp_path / "a").write_bytes(data)
    np.testing.assert_array_equal(jq.checkpoints.open(tmp_path / "a").load()["w"], W)


def test_an_index_may_look_like_safetensors(tmp_path):
    safetensors.numpy.save_file({"w": W}, tmp_path / "model.safetensors")
    text = '{"meta":{},"weight_map":{"w":"model.safetensors"}}'
    assert text[8] == "{"
    (tmp_path / "model.safetensors.index.json").write_text(text)
    found = jq.checkpoints.open(tmp_path / "model.safetensors.index.json")
    np.testing.assert_array_equal(found.load()["w"], W)


def test_names_are_those_of_gguf_files(tmp_path):
    metadata = [("general.architecture", STRING, "llama")]
    data = gguf(metadata, [("output_norm.weight", (32,), 0, W[0].tobytes())])
    (tmp_path / "a").write_bytes(data)
    assert list(jq.checkpoints.open(tmp_path / "a")) == ["output_norm.weight"]
    assert list(jq.checkpoints.open(tmp_path / "a", names="huggingface")) == ["model.norm.weight"]
    jq.save(tmp_path / "b", {"w": jnp.asarray(W)})
    for path in (tmp_path / "b", tmp_path):
        with pytest.raises(ValueError, match=f"names is for GGUF files; got 'stored' for {path}"):
            jq.checkpoints.open(path, names="stored")


def test_a_missing_file_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        jq.checkpoints.open(tmp_path / "nothing")
