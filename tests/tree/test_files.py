import dataclasses
import hashlib
import json
import os
import re
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxquant import (
    FILE_FORMATS,
    FORMATS,
    INT4,
    NVFP4,
    W4A16,
    W8A8,
    ArrayConfig,
    BlockRotation,
    Format,
    Inputs,
    QTensor,
    Rule,
    checkpoints,
    load,
    matmul,
    quantize,
    save,
    tree,
)
from jaxquant.tree import files
from jaxquant.tree.internal import check_target, read_arrays, read_tree

from .. import cases
from .trees import Dense, Module, State, assert_equal_trees, leaves_of, normal, parameters


def every_format():
    """One array per format and kind, one of them stored in another order."""
    x = cases.gaussian()
    names = ["int4-row", "int4-asym_nested_scales", "int8-asym_tensor", "int2-asym_blocks"]
    names += [f"{f}-row" for f in FORMATS.values() if not f.rounds]
    names += ["fp8_e4m3-bfloat16_scales"]
    trees = {name: quantize(x, *cases.CASES[name]) for name in names}
    trees["int4-row"] = trees["int4-row"].reorder((-1, -2))
    trees["a format of one's own"] = quantize(
        x, ArrayConfig(format=Format("mine", "uint4", -1.0, 1.0, (-1.0, 0.0, 0.25, 1.0)))
    )
    return trees


def digest(params):
    """A hash of all bits and static fields of a tree."""
    found = hashlib.sha256(repr(jax.tree.structure(params)).encode())
    for leaf in jax.tree.leaves(params):
        found.update(f"{leaf.dtype}{leaf.shape}".encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()


@pytest.mark.slow
def test_every_format_round_trips_bit_for_bit_in_this_and_a_new_process(tmp_path):
    params, path = every_format(), tmp_path / "all.safetensors"
    save(path, params)

    assert_equal_trees(load(path), params)
    script = (
        "import hashlib, sys\nimport jax, numpy as np\nimport jaxquant\n"
        "found = jaxquant.load(sys.argv[1])\n"
        "total = hashlib.sha256(repr(jax.tree.structure(found)).encode())\n"
        "for leaf in jax.tree.leaves(found):\n"
        "    total.update(f'{leaf.dtype}{leaf.shape}'.encode() + np.asarray(leaf).tobytes())\n"
        "assert 'pickle' not in repr(open(sys.argv[1], 'rb').read(200))\n"
        "print(total.hexdigest())\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(params)


def test_inputs_round_trip_with_their_arrays_and_config(tmp_path):
    q = quantize(normal(64, 32), W8A8.weights)
    inputs = {
        "dynamic": Inputs(W8A8.inputs),
        "static": Inputs(W8A8.inputs, scale=jnp.float32(0.1), zero_point=jnp.int8(3)),
        "multiplied": Inputs(multiplier=jnp.arange(64.0)),
        "percentile": Inputs(cases.CASES["int8-percentile"].config),
        "none": None,
    }
    params = {k: dataclasses.replace(q, inputs=v) for k, v in inputs.items()}
    save(tmp_path / "a", params)
    found = load(tmp_path / "a")
    assert_equal_trees(found, params)
    for name, value in inputs.items():
        assert getattr(found[name].inputs, "config", None) == getattr(value, "config", None)


def test_offsets_and_permutations_round_trip_in_files_of_version_2(tmp_path):
    q: Any = quantize(normal(64, 32), W8A8.weights)
    nested = quantize(-q.scale, ArrayConfig(), axis=0)
    params = {
        "offset": dataclasses.replace(q, offset=-q.scale),
        "nested": dataclasses.replace(q, offset=nested),
        "permuted": dataclasses.replace(q, inputs=Inputs(permutation=jnp.arange(64)[::-1])),
    }
    for name, q in params.items():
        save(tmp_path / name, {"q": q})
        assert_equal_trees(load(tmp_path / name), {"q": q})
        with safetensors.safe_open(tmp_path / name, "numpy") as file:
            assert json.loads(file.metadata()["jaxquant"])["version"] == 2


def test_rotations_round_trip_in_files_of_version_3(tmp_path):
    q: Any = quantize(normal(64, 32), W8A8.weights)
    rotation = BlockRotation(jnp.tile(jnp.array([1, -1], jnp.int8), 32), 16)
    inputs = Inputs(W8A8.inputs, multiplier=jnp.arange(64.0), rotation=rotation)
    params = {"offset": dataclasses.replace(q, offset=q.scale, inputs=inputs), "plain": q}
    save(tmp_path / "a", params)
    found = load(tmp_path / "a")
    assert_equal_trees(found, params)
    assert found["offset"].inputs.rotation.block == 16
    with safetensors.safe_open(tmp_path / "a", "numpy") as file:
        assert json.loads(file.metadata()["jaxquant"])["version"] == 3
    assert_equal_trees(checkpoints.open(tmp_path / "a").load(), params)


MINE = {
    "ternary": Format("ternary", "uint4", -1.0, 1.0, codebook=(-1.0, 0.0, 1.0)),
    "signed": Format("signed", "int8", -1.0, 1.0, codebook=(-1.0, -0.5, 0.0, 0.5, 1.0)),
    # As many codes as 2, 3 and 4 bits have, but not those of two's complement.
    "upwards": Format("upwards", "int4", -1, 2),
    "shifted": Format("shifted", "int8", -3, 4),
    "nonnegative": Format("nonnegative", "int8", 0, 15),
}
NARROW = {"int3": 3, "uint3": 3, "int5": 5, "uint5": 5, "int6": 6, "uint6": 6, "iq3_nl": 3}
NARROW |= {"ternary": 2, "signed": 4, "upwards": 3, "shifted": 4, "nonnegative": 5}


@pytest.mark.parametrize("shape", [(24, 32), (7, 11), (3, 5, 1), (0, 4)], ids=str)
@pytest.mark.parametrize("name", NARROW)
def test_codes_take_as_many_bits_as_tell_them_apart_in_files_of_version_4(tmp_path, name, shape):
    format, bits = {**FILE_FORMATS, **MINE}[name], NARROW[name]
    x = normal(*shape)
    config = ArrayConfig(format=format, symmetric=not format.rounds or format.has_negative)
    q = quantize(x, config)
    save(tmp_path / "a", {"q": q})
    assert_equal_trees(load(tmp_path / "a"), {"q": q})
    with safetensors.safe_open(tmp_path / "a", "numpy") as file:
        assert json.loads(file.metadata()["jaxquant"])["version"] == 4
        stored = file.get_tensor("q/codes")
    assert (stored.dtype, stored.size) == (np.uint8, -(-x.size * bits // 8))
    # Code i takes bits [i * bits, (i + 1) * bits), the lowest first.
    stream = np.unpackbits(stored, bitorder="little")[: x.size * bits].reshape(-1, bits)
    codes = (stream * 2 ** np.arange(bits)).sum(1).reshape(shape)
    np.testing.assert_array_equal(codes, np.asarray(q.codes, int) % 2**bits)
    lazy = checkpoints.open(tmp_path / "a")
    assert_equal_trees(lazy.load(), {"q": q})
    value: Any = lazy["q"].value
    for start in range(shape[0] - 1):
        part = value.codes.read((slice(start, start + 2), *map(slice, shape[1:])))
        np.testing.assert_array_equal(part, np.asarray(q.codes)[start : start + 2])


def test_codes_beyond_their_format_are_an_error(tmp_path):
    q = quantize(normal(8, 4), ArrayConfig(format=FILE_FORMATS["int3"]))
    q = dataclasses.replace(q, codes=q.codes.at[0, 0].set(5))
    message = r"q/codes: codes must be from -4 to 3 in a format of 3 bits; got -\d to 5"
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "a", {"q": q})
    assert not (tmp_path / "a").exists()


def test_quantized_trees_run_the_same_after_loading(tmp_path):
    params = tree.quantize(parameters(), W8A8)
    save(tmp_path / "a", params)
    x = jnp.asarray(normal(3, 64))
    run = jax.jit(lambda p: matmul(x, p["out"][0]))
    np.testing.assert_array_equal(run(load(tmp_path / "a")), run(params))


@pytest.mark.parametrize("metadata", [None, {}, {"a": "1", "jaxquant": "x", "é\n\"'": "\u2028{}"}])
def test_metadata_is_read_without_the_tensors(tmp_path, metadata):
    save(tmp_path / "a", parameters(), metadata)
    assert tree.read_metadata(tmp_path / "a") == (metadata or {})
    assert read_tree(tmp_path / "a")[1] == (metadata or {})


CONTAINERS = {
    "named tuple": lambda: Dense(quantize(normal(8, 4), W8A8.weights), jnp.ones(4)),
    "module": lambda: Module(Module(jnp.ones((2, 3)), None, width=7), {"a": jnp.zeros(2)}),
    "state": lambda: State({"z": jnp.ones(2), "a": State({"kernel": jnp.zeros((3, 2))})}),
    "list": lambda: [Dense(jnp.ones(1), None), (jnp.zeros(2), "text", 3)],
}


@pytest.mark.parametrize("build", CONTAINERS.values(), ids=CONTAINERS)
def test_like_restores_custom_containers(tmp_path, build):
    params = build()
    save(tmp_path / "a", params)
    assert_equal_trees(load(tmp_path / "a", like=params), params)
    # Dicts if the container's class is unknown, with the same leaves at the same paths.
    plain = leaves_of(load(tmp_path / "a"))
    assert plain.keys() == leaves_of(params).keys()
    assert_equal_trees([plain[k] for k in leaves_of(params)], list(leaves_of(params).values()))


def test_like_may_be_abstract_and_unquantized(tmp_path):
    params = {"dense": Dense(jnp.asarray(normal(64, 32)), jnp.ones(32))}
    quantized = tree.quantize(params, W8A8)
    save(tmp_path / "a", quantized)
    assert_equal_trees(load(tmp_path / "a", like=jax.eval_shape(lambda: params)), quantized)


@pytest.mark.parametrize(
    "params, like, text",
    [
        (
            {"a": np.ones(2), "b": np.ones(2)},
            {"a": 0, "c": 0, "d": 0},
            "and `like` must have the same leaves; got 2 and 3, which differ at b, c, d",
        ),
        (
            {"a/b": np.ones(2), "a": {"b": np.zeros(2)}},
            {"a/b": 0, "a": {"b": 0}},
            "has several leaves at 'a/b', which `like` cannot tell apart. Load it without",
        ),
        (
            {"a": np.ones((2, 3))},
            {"a": np.ones((3, 2))},
            r"and `like` must have the same shapes; got \(2, 3\) and \(3, 2\) at 'a'",
        ),
    ],
)
def test_another_structure_raises(tmp_path, params, like, text):
    save(tmp_path / "a", params)
    with pytest.raises(ValueError, match=text):
        load(tmp_path / "a", like=like)
    assert_equal_trees(load(tmp_path / "a"), params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme, layers, width", [(W4A16, 1, 1536), (cases.CASES["nvfp4-row"].config, 12, 256)]
)
def test_the_file_is_no_larger_than_the_stated_bytes_and_1_percent(tmp_path, scheme, layers, width):
    kernel, vector = normal(width, width), np.ones(width, np.float32)
    layer = {
        "attention": dict.fromkeys(("query", "key", "value", "out"), kernel),
        "norm": {"scale": vector, "bias": vector},
    }
    params = tree.quantize({"layers": [layer] * layers}, scheme)
    save(tmp_path / "a", params)
    stated = tree.report(None, params).total.bytes_after
    assert stated > 2**20
    assert stated <= os.path.getsize(tmp_path / "a") <= 1.01 * stated


@pytest.mark.parametrize(
    "metadata",
    [{"a": 1}, {1: "a"}, {"a": None}, {"a": {"b": "c"}}],
    ids=["int", "key", "none", "dict"],
)
def test_metadata_other_than_strings_raises(tmp_path, metadata):
    with pytest.raises(ValueError, match=r"metadata must map str to str; got \{.*Use json.dumps"):
        save(tmp_path / "a", parameters(), metadata)
    assert list(tmp_path.iterdir()) == []


# Atomic writing.


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
@pytest.mark.parametrize("has_old", [True, False])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(
    tmp_path, monkeypatch, fails, has_old
):
    path = tmp_path / "a.safetensors"
    if has_old:
        save(path, {"old": np.ones(3)})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*arguments, **options):
        if fails == "write":  # Half of the file was written.
            arguments[0].write(b"half")
        raise OSError("disk full")

    place = {"write": (files, "write_tensors"), "fsync": (os, "fsync")}
    monkeypatch.setattr(*place.get(fails, (os, "replace")), fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, parameters())

    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_tree_that_cannot_be_saved_keeps_the_old_file(tmp_path):
    save(tmp_path / "a", {"old": np.ones(3)})
    with pytest.raises(ValueError, match="bad: a leaf must be"):
        save(tmp_path / "a", {"good": np.ones(3), "bad": object()})
    assert_equal_trees(load(tmp_path / "a"), {"old": np.ones(3)})
    assert len(list(tmp_path.iterdir())) == 1


def test_data_are_synced_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    calls = []
    is_folder = lambda f: stat.S_ISDIR(os.fstat(f if isinstance(f, int) else f.fileno()).st_mode)  # noqa: E731
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda f: calls.append("folder" if is_folder(f) else "file"))
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), replace(*a)))
    save(tmp_path / "a", parameters())
    assert calls == ["file", "replace", "folder"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_of_the_umask(tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        save(tmp_path / "a", parameters())
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_a_replaced_file_keeps_its_mode(tmp_path, mode):
    save(tmp_path / "a", {"old": np.ones(3)})
    (tmp_path / "a").chmod(mode)
    save(str(tmp_path / "a"), parameters())
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
    assert "embed" in load(str(tmp_path / "a"))


def test_a_loaded_tree_may_be_saved_over_its_own_file(tmp_path):
    save(tmp_path / "a", parameters())
    found = load(tmp_path / "a")
    save(tmp_path / "a", found)
    assert_equal_trees(load(tmp_path / "a"), parameters())
    assert_equal_trees(found, parameters())


def test_reading_from_a_missing_folder_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere" / "a")


# Each gets a tree that cannot be saved, to test that the path is checked first.
CHECKS = {"save": lambda path: save(path, {"a": object()}), "check_target": check_target}
each_check = pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)


@each_check
@pytest.mark.parametrize("folder", ["nowhere", "no/where", "file"])
def test_a_target_in_a_missing_folder_raises(tmp_path, check, folder):
    (tmp_path / "file").touch()
    text = f"^{re.escape(str(tmp_path / folder))} is not a folder; create it first"
    with pytest.raises(FileNotFoundError, match=text):
        check(tmp_path / folder / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@each_check
@pytest.mark.parametrize("name", ["inner", ".", ""])
def test_a_target_that_is_a_folder_raises(tmp_path, monkeypatch, check, name):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path)
    text = f"^{re.escape(name)} is a folder; name a file, such as .*model.safetensors"
    with pytest.raises(IsADirectoryError, match=text):
        check(name)
    assert [p.name for p in tmp_path.rglob("*")] == ["inner"]


def test_a_tree_in_place_of_the_path_is_named():
    with pytest.raises(ValueError, match=r"path, as in jq\.save\(path, tree\); got dict\."):
        save({"x": jnp.ones(2)}, "model.safetensors")  # pyright: ignore[reportArgumentType]


def test_a_target_may_be_new_or_a_file(tmp_path, monkeypatch):
    save(tmp_path / "old", small())
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "old", tmp_path / "new", "new", "./new"):
        check_target(path)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


# Damaged files and files of other kinds.

READERS = {
    "load": load,
    "read_metadata": tree.read_metadata,
    "read_tree": read_tree,
    "read_arrays": read_arrays,
}
each_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


def small():
    return {
        "w": quantize(normal(4, 6), ArrayConfig(format=INT4)),
        "b": jnp.asarray(normal(3)),
        "h": jnp.ones(3, jnp.float8_e5m2),
    }


@pytest.fixture(scope="module")
def saved():
    """The bytes of a small file."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "a", small(), {"k": "v"})
        return (Path(folder) / "a").read_bytes()


def header_of(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_manifest(data, **changes):
    """The file with some manifest entries replaced and a correct checksum."""
    header, rest = header_of(data)
    manifest = json.loads(header["__metadata__"]["jaxquant"])
    text = json.dumps({**manifest, **changes})
    header["__metadata__"] = {
        "jaxquant": text,
        "jaxquant.crc32": str(zlib.crc32(text.encode())),
    }
    return with_header(header, rest)


@each_reader
@pytest.mark.parametrize("missing", [1, 20, 40])
def test_the_error_for_a_truncated_file_gives_its_sizes(tmp_path, saved, read, missing):
    (tmp_path / "a").write_bytes(saved[:-missing])
    text = f"a is truncated: it has {len(saved) - missing} bytes, but its header says"
    with pytest.raises(ValueError, match=text):
        read(tmp_path / "a")


@each_reader
def test_a_file_that_ends_within_its_header_is_truncated(tmp_path, saved, read):
    (tmp_path / "a").write_bytes(saved[:200])
    with pytest.raises(ValueError, match="a is truncated: it has 200 bytes, but its header says "):
        read(tmp_path / "a")


@each_reader
def test_a_file_longer_than_its_header_says_is_altered(tmp_path, saved, read):
    (tmp_path / "a").write_bytes(saved + b"more")
    with pytest.raises(ValueError, match=f"a is altered: it has {len(saved) + 4} bytes, but its"):
        read(tmp_path / "a")


def zipped(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", b"x" * 100)


FOREIGN = {
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(b"hello"),
    "text": lambda path: path.write_text("Once upon a time there was a file of text.\n" * 9),
    "json": lambda path: path.write_text('{"a": 1}' * 9),
    "zip": zipped,
    "zeros": lambda path: path.write_bytes(bytes(1000)),
}


@each_reader
@pytest.mark.parametrize("write", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_another_kind_raises(tmp_path, read, write):
    write(tmp_path / "a")
    size = os.path.getsize(tmp_path / "a")
    text = f"a is not a safetensors file: {size} bytes, and no header at the start. Choose another"
    with pytest.raises(ValueError, match=text):
        read(tmp_path / "a")


@pytest.mark.parametrize("read", [load, tree.read_metadata])
def test_plain_safetensors_are_not_loaded_as_a_saved_tree(tmp_path, read):
    safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"was not written by jaxquant.save: .* Read it with "):
        read(tmp_path / "a")


def test_arrays_of_plain_safetensors_are_read_by_name(tmp_path):
    arrays = {"a": normal(3, 4), "b.c": np.arange(3), "d": np.ones(2, jnp.bfloat16)}
    safetensors.numpy.save_file(arrays, tmp_path / "a")
    assert_equal_trees(read_arrays(tmp_path / "a"), arrays)


def test_the_error_names_a_dtype_that_numpy_lacks(tmp_path):
    entry = {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}
    (tmp_path / "a").write_bytes(with_header({"layer.weight": entry}, bytes(4)))
    with pytest.raises(ValueError, match=r"'layer.weight' has dtype F4, which .* Store it as bfl"):
        read_arrays(tmp_path / "a")


@each_reader
@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]},
        {"dtype": "F32", "data_offsets": [0, 16]},
    ],
)
def test_a_header_that_safetensors_cannot_read_is_altered(tmp_path, read, entry):
    (tmp_path / "a").write_bytes(with_header({"w": entry}, bytes(16)))
    with pytest.raises(
        ValueError, match=r"a was altered: its header is malformed, .*(F33|bytes|shape)"
    ):
        read(tmp_path / "a")


@each_reader
@pytest.mark.parametrize("entry", [3, [], {}, {"data_offsets": [0]}, {"data_offsets": ["0", "4"]}])
def test_a_header_that_cannot_be_read_is_altered(tmp_path, read, entry):
    (tmp_path / "a").write_bytes(with_header({"w": entry}, bytes(16)))
    with pytest.raises(ValueError, match=r"a was altered: its header is malformed, .* Copy it"):
        read(tmp_path / "a")


def test_a_byte_flipped_in_the_data_names_the_tensor(tmp_path, saved):
    header, _ = header_of(saved)
    start = len(saved) - len(header_of(saved)[1])
    entries = [(k, v) for k, v in header.items() if k != "__metadata__"]
    assert len(entries) == 4
    for name, entry in entries:
        data = bytearray(saved)
        data[start + entry["data_offsets"][0]] ^= 1
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(ValueError, match=f"a was altered: tensor '{name}' does not have its c"):
            load(tmp_path / "a")


@pytest.mark.parametrize("read", [load, tree.read_metadata])
def test_a_changed_manifest_is_detected(tmp_path, saved, read):
    header, data = header_of(saved)
    manifest = header["__metadata__"]["jaxquant"]
    header["__metadata__"]["jaxquant"] = manifest.replace('"k": "v"', '"k": "w"')
    assert header["__metadata__"]["jaxquant"] != manifest
    (tmp_path / "a").write_bytes(with_header(header, data))
    with pytest.raises(ValueError, match=r"its header does not have the checksum \d+. Save it"):
        read(tmp_path / "a")


@pytest.mark.parametrize("read", [load, tree.read_metadata])
@pytest.mark.parametrize("version", [6, 17])
def test_a_newer_version_raises(tmp_path, saved, read, version):
    (tmp_path / "a").write_bytes(with_manifest(saved, version=version, tree="of another kind"))
    with pytest.raises(
        ValueError, match=f"a has version {version}; this jaxquant reads up to 5. U"
    ):
        read(tmp_path / "a")


def test_the_error_names_a_missing_tensor(tmp_path, saved):
    header, _ = header_of(saved)
    metadata = header["__metadata__"]
    arrays = {k: v for k, v in raw_arrays(tmp_path, saved).items() if not k.startswith("w/")}
    safetensors.numpy.save_file(arrays, tmp_path / "a", metadata=metadata)
    with pytest.raises(ValueError, match=r"a lacks 2 of its tensors, such as 'w/codes'. Save it"):
        load(tmp_path / "a")


def raw_arrays(folder, data):
    (folder / "raw").write_bytes(data)
    return safetensors.numpy.load_file(folder / "raw")


def test_a_tensor_of_another_shape_or_dtype_is_detected(tmp_path, saved):
    metadata = header_of(saved)[0]["__metadata__"]
    for change in (lambda x: x.reshape(1, 3), lambda x: x.view(np.int32)):
        arrays = raw_arrays(tmp_path, saved)
        arrays["b"] = change(arrays["b"])
        safetensors.numpy.save_file(arrays, tmp_path / "a", metadata=metadata)
        with pytest.raises(ValueError, match="a was altered: tensor 'b' does not have its checks"):
            load(tmp_path / "a")


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_altered_byte_raises_or_makes_no_difference(saved, place, flip):
    data = bytearray(saved)
    data[int(place * len(data))] ^= flip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(data)
        try:
            found = load(path)
        except ValueError:
            return
        assert_equal_trees(found, small())


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(data=st.binary(max_size=200), length=st.integers(0, 200))
def test_arbitrary_bytes_raise(data, length):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(struct.pack("<Q", length) + b"{" + data)
        for read in READERS.values():
            with pytest.raises(ValueError, match=r"altered|truncated|not a safetensors"):
                read(path)


def test_plain_tools_can_read_the_file(tmp_path):
    params = {"w": quantize(normal(32, 16), ArrayConfig(format=NVFP4)), "b": jnp.ones(3)}
    save(tmp_path / "a", params, {"note": "mine"})
    with safetensors.safe_open(tmp_path / "a", "numpy") as file:
        assert set(file.keys()) == {"w/codes", "w/scale/codes", "w/scale/scale", "b"}
        assert file.get_tensor("w/codes").nbytes == 32 * 16 // 2
        manifest = json.loads(file.metadata()["jaxquant"])
    assert manifest["version"] == 1
    assert manifest["metadata"] == {"note": "mine"}


def test_reading_metadata_does_not_read_tensors(tmp_path, saved):
    (tmp_path / "a").write_bytes(saved[: -len(header_of(saved)[1])])
    # As large as the header says, but all zeros: only the tensors are wrong.
    os.truncate(tmp_path / "a", len(saved))
    assert tree.read_metadata(tmp_path / "a") == {"k": "v"}
    with pytest.raises(ValueError, match="was altered: tensor"):
        load(tmp_path / "a")


def test_rules_apply_to_a_loaded_tree(tmp_path):
    save(tmp_path / "a", {"w": normal(64, 32), "v": normal(64, 32, seed=1)})
    first = tree.quantize(load(tmp_path / "a"), [Rule("w", W8A8)])
    save(tmp_path / "a", first)
    second = tree.quantize(load(tmp_path / "a"), [Rule("v", W8A8)])
    assert all(isinstance(leaf, QTensor) for leaf in second.values())
