"""Tensors that were altered are found by their checksums."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import __main__ as command_line
from jaxquant import load, quantize, save, tree
from jaxquant.core import W8A8
from jaxquant.tree.internal import open_tensors, write_tensors

from ..checkpoints.gguf_files import gguf
from .trees import normal

NAMES = ("bias", "layers/0/codes", "layers/0/scale", "layers/1")


@pytest.fixture
def path(tmp_path):
    q = quantize(normal(6, 4), W8A8.weights, axis=0)
    save(tmp_path / "a", {"layers": [q, jnp.ones((2, 3), jnp.bfloat16)], "bias": jnp.arange(5)})
    return tmp_path / "a"


def alter(path, name):
    """Flips a bit of the last byte of a tensor."""
    with open_tensors(path) as file:
        place = file.start + file.entries[name].stop - 1
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_the_tensors_of_an_intact_file_have_their_checksums(path):
    assert tree.verify(path) == dict.fromkeys(sorted(NAMES), True)


@pytest.mark.parametrize("altered", [NAMES[:1], NAMES[1:3], NAMES])
def test_all_altered_tensors_are_found(path, altered):
    for name in altered:
        alter(path, name)
    found = tree.verify(path)
    assert {name for name, is_intact in found.items() if not is_intact} == set(altered)
    assert set(found) == set(NAMES)


def test_load_compares_checksums_unless_it_is_told_not_to(path):
    alter(path, "bias")
    with pytest.raises(ValueError, match="a was altered: tensor 'bias' does not have its checksum"):
        load(path)
    with pytest.raises(ValueError, match="a was altered"):
        load(path, verify=True)
    found = load(path, verify=False)
    np.testing.assert_array_equal(found["bias"][:4], np.arange(4))
    assert found["bias"][4] == 4 + (1 << 24)
    assert found["layers"][0].shape == (6, 4)


def test_files_of_others_have_no_checksums(tmp_path):
    (tmp_path / "b").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="b is a safetensors file, but was not written"):
        tree.verify(tmp_path / "b")


def test_inspect_verifies_first(path, capsys):
    assert command_line.main(["inspect", str(path), "--verify"]) == 0
    output = capsys.readouterr()
    assert f"All 4 tensors of {path} match their checksums." in output.err
    assert "Quantization by leaf" in output.out
    alter(path, "layers/0/scale")
    alter(path, "layers/1")
    assert command_line.main(["inspect", str(path), "--verify"]) == 2
    output = capsys.readouterr()
    wanted = f"2 of 4 tensors of {path} were altered: layers/0/scale, layers/1."
    assert wanted in output.err
    assert not output.out


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "."])
def test_inspect_verifies_no_files_of_others(tmp_path, capsys, name):
    data = gguf([], [("a.weight", (3,), 0, bytes(12))])
    (tmp_path / "model.gguf").write_bytes(data)
    with (tmp_path / "model.safetensors").open("wb") as file:
        write_tensors(file, {"a": np.ones(3, np.float32)}, {})
    path = tmp_path / name
    assert command_line.main(["inspect", str(path), "--verify"]) == 2
    wanted = f"--verify needs a file of jaxquant.save, which has checksums; got {path}. Leave"
    assert wanted in capsys.readouterr().err
