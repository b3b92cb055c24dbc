"""Malformed headers, manifests and structures raise one ValueError with the file name."""

import base64
import copy
import dataclasses
import json
import struct
import sys
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import (
    FILE_FORMATS,
    INT4,
    W8A8,
    ArrayConfig,
    Inputs,
    checkpoints,
    load,
    quantize,
    save,
    tree,
)
from jaxquant.tree.internal import read_arrays, read_tree

from .parts import container, joined, parts_of
from .trees import normal

READERS = {
    "load": load,
    "read_metadata": tree.read_metadata,
    "read_tree": read_tree,
    "read_arrays": read_arrays,
}
# Replacements for a JSON value.
ODD = [None, True, -1, 2**70, 1.5, "\ud800", [[]], {}, {"a": 1}, ["x", 3]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small file with every kind of node, as bytes."""
    q = quantize(normal(4, 6), ArrayConfig(format=INT4, symmetric=False))
    inputs = Inputs(W8A8.inputs, scale=jnp.float32(0.1))
    params = {
        "q": dataclasses.replace(q, inputs=inputs),
        "list": [jnp.ones(2), (None, "text", 3)],
        "half": jnp.ones(3, jnp.float8_e5m2),
    }
    path = tmp_path_factory.mktemp("saved") / "a"
    save(path, params, {"k": "v"})
    load(path)
    return path.read_bytes()


def places(value, path=()):
    """The path of each value inside a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def changed(value, path, change):
    """A copy with `change` applied to the container and key at one place."""
    root = {"": copy.deepcopy(value)}
    node, key = root, ""
    for step in path:
        node, key = node[key], step
    change(node, key)
    return root.get("")


def drop(node, key):
    del node[key]


def repeat(node, key):
    node[key] = [node[key], node[key]]


def replace_by(odd):
    def replace(node, key):
        node[key] = odd

    return replace


CHANGES = {"drop": drop, "repeat": repeat, **{json.dumps(v): replace_by(v) for v in ODD}}


@pytest.mark.slow
@pytest.mark.some_rows(8)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("part", ["header", "manifest", "contents"])
def test_any_change_of_a_part_raises_a_valueerror_with_the_file_name(tmp_path, saved, part, change):
    parts, data = parts_of(saved)
    path, errors = tmp_path / "file", []
    for place in places(parts[part]):
        path.write_bytes(joined({**parts, part: changed(parts[part], place, change)}, data))
        for read in (load, read_tree, tree.read_metadata):
            try:
                read(path)
            except ValueError as error:
                errors.append(str(error))
    assert len(errors) >= (10 if part == "contents" else 2)
    assert all(str(path) in text and len(text) < 1000 for text in errors)


NESTED = {"lists": "[" * 200_000 + "]" * 200_000, "dicts": '{"a":' * 100_000 + "1" + "}" * 100_000}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("nested", NESTED.values(), ids=NESTED)
def test_a_deeply_nested_header_is_malformed(tmp_path, read, nested):
    (tmp_path / "a").write_bytes(container(f'{{"w":{nested}}}'))
    with pytest.raises(ValueError, match=r"a was altered: its header is malformed, RecursionError"):
        read(tmp_path / "a")


@pytest.mark.parametrize("nested", NESTED.values(), ids=NESTED)
def test_a_deeply_nested_manifest_or_structure_is_malformed(tmp_path, saved, nested):
    parts, data = parts_of(saved)
    whole = joined(parts, data)
    metadata = json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])["__metadata__"]
    bomb = base64.b64encode(zlib.compress(nested.encode())).decode()
    structure = json.dumps({**json.loads(metadata["jaxquant"]), "tree": bomb})
    for text, what in ((nested, "manifest"), (structure, "structure")):
        metadata = {"jaxquant": text, "jaxquant.crc32": str(zlib.crc32(text.encode()))}
        header = json.dumps({"__metadata__": metadata, **parts["header"]})
        (tmp_path / "a").write_bytes(container(header, data))
        with pytest.raises(ValueError, match=f"a: its {what} is malformed, RecursionError"):
            load(tmp_path / "a")


def test_a_tree_of_many_levels_is_malformed(tmp_path, saved):
    parts, data = parts_of(saved)
    node = ["value", 1]
    # As deep as the JSON parser accepts, and deeper than the recursion limit allows for building
    # the tree: since Python 3.12 the parser has its own limit, and comprehensions are not calls.
    levels = 450 if sys.version_info < (3, 12) else 1200
    for _ in range(levels):
        node = ["list", [node]]
    parts["contents"]["structure"] = node
    (tmp_path / "a").write_bytes(joined(parts, data))
    with pytest.raises(ValueError, match="a: its structure is malformed, RecursionError"):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    "part, place, value, text",
    [
        ("manifest", ["version"], "1", "manifest is malformed, .*positive int, got '1'"),
        ("manifest", ["version"], True, "manifest is malformed, .*positive int, got True"),
        ("manifest", ["version"], 0, "manifest is malformed, .*positive int, got 0"),
        ("manifest", ["metadata"], {"k": 3}, "manifest is malformed, .*must map str to str"),
        ("header", ["half", "dtype"], "F32", "header is malformed, .*F32 of shape .* 3 bytes"),
        ("header", ["half", "dtype"], 8, "header is malformed, .*unknown dtype 8"),
        ("header", ["half", "data_offsets"], [1, 4], "header is malformed, .*starts at byte"),
        ("header", ["half", "shape"], [3.0], "header is malformed, .*must be integers"),
        ("header", ["half", "shape"], [0, 2**80], "header is malformed, .*"),
    ],
)
def test_the_error_says_what_is_malformed(tmp_path, saved, part, place, value, text):
    parts, data = parts_of(saved)
    parts[part] = changed(parts[part], place, replace_by(value))
    (tmp_path / "a").write_bytes(joined(parts, data))
    with pytest.raises(ValueError, match=f"a(:| was altered:) its {text}"):
        load(tmp_path / "a")


@pytest.mark.parametrize("read", [load, lambda path: checkpoints.open(path).load()])
@pytest.mark.parametrize("bits", [0, 2, 4, 8, -3, "3", True])
def test_codes_of_another_number_of_bits_are_malformed(tmp_path, bits, read):
    config = ArrayConfig(format=FILE_FORMATS["int3"])
    save(tmp_path / "a", {"q": quantize(normal(8, 4), config)})
    parts, data = parts_of((tmp_path / "a").read_bytes())
    text = json.dumps(parts["contents"])
    assert text.count('"int4", [8, 4], 3]') == 1
    text = text.replace('"int4", [8, 4], 3]', f'"int4", [8, 4], {json.dumps(bits)}]')
    parts["contents"] = json.loads(text)
    (tmp_path / "a").write_bytes(joined(parts, data))
    with pytest.raises(ValueError, match="a: its structure is malformed, "):
        read(tmp_path / "a")


@pytest.mark.parametrize("read", [load, lambda path: checkpoints.open(path).report()])
@pytest.mark.parametrize(
    "place, value, text",
    [
        (["order"], [-1, {}], r"order must permute the last axes, .* got \(-1, \{\}\)"),
        (["order"], 1.5, r"order must permute the last axes, .* got 1.5"),
        (["order"], [-1, -3], r"order must permute the last axes, .* got \(-1, -3\)"),
        (["format", "name"], None, r"name must be a str, such as 'int6'; got None"),
        (["format", "name"], [1], r"name must be a str, such as 'int6'; got \(1,\)"),
    ],
)
def test_static_fields_of_other_types_are_malformed(tmp_path, saved, place, value, text, read):
    parts, data = parts_of(saved)
    rows = parts["contents"]["statics"]
    row = next(i for i, fields in enumerate(rows) if "order" in fields)
    parts["contents"] = changed(parts["contents"], ["statics", row, *place], replace_by(value))
    (tmp_path / "a").write_bytes(joined(parts, data))
    with pytest.raises(ValueError, match=f"a: its structure is malformed, ValueError: {text}"):
        read(tmp_path / "a")


@pytest.mark.parametrize("read", [checkpoints.open, read_tree])
def test_a_dict_that_jax_cannot_sort_is_an_error_with_the_file_name(tmp_path, read):
    save(tmp_path / "a", {"list": [(jnp.ones(1), {1: jnp.ones(2), "b": jnp.ones(3)})]})
    assert set(load(tmp_path / "a")["list"][0][1]) == {1, "b"}
    text = r"a holds a dict with keys of several types, .* sort: \[1, 'b'\]. jaxquant.load reads it"
    before = depth()
    for _ in range(3):
        with pytest.raises(ValueError, match=text):
            read(tmp_path / "a")
    assert depth() == before


def depth():
    """How deep a function can call itself from here."""
    try:
        return depth() + 1
    except RecursionError:
        return 0


def test_a_structure_with_a_wrong_dtype_is_malformed(tmp_path, saved):
    parts, data = parts_of(saved)
    text = json.dumps(parts["contents"])
    assert '"float8_e5m2"' in text
    for dtype in ("float9", "object", "float64", "int4"):
        parts["contents"] = json.loads(text.replace('"float8_e5m2"', f'"{dtype}"'))
        (tmp_path / "a").write_bytes(joined(parts, data))
        with pytest.raises(ValueError, match=r"a: its structure is malformed, "):
            load(tmp_path / "a")


@pytest.mark.parametrize(
    "tree",
    [
        "not base64!",
        base64.b64encode(b"not zlib").decode(),
        base64.b64encode(zlib.compress(b"{")).decode(),
        base64.b64encode(zlib.compress(b"[1]")).decode(),
        base64.b64encode(zlib.compress(b"{}" * 999)[:-9]).decode(),
    ],
)
def test_contents_that_cannot_be_decompressed_are_malformed(tmp_path, tree):
    text = json.dumps({"version": 1, "metadata": {}, "tree": tree})
    metadata = {"jaxquant": text, "jaxquant.crc32": str(zlib.crc32(text.encode()))}
    (tmp_path / "a").write_bytes(container(json.dumps({"__metadata__": metadata})))
    with pytest.raises(ValueError, match="a: its structure is malformed, "):
        load(tmp_path / "a")


def test_decompression_stops_at_the_size_limit(tmp_path):
    bomb = base64.b64encode(zlib.compress(b" " * 200_000_000, 1)).decode()
    text = json.dumps({"version": 1, "metadata": {}, "tree": bomb})
    metadata = {"jaxquant": text, "jaxquant.crc32": str(zlib.crc32(text.encode()))}
    (tmp_path / "a").write_bytes(container(json.dumps({"__metadata__": metadata})))
    with pytest.raises(ValueError, match="incomplete, or has more than 100000000 bytes"):
        load(tmp_path / "a")


def test_a_tensor_is_read_once(tmp_path, saved):
    parts, data = parts_of(saved)
    parts["contents"]["structure"] = ["list", [["array", ["list/0"]]] * 2]
    (tmp_path / "a").write_bytes(joined(parts, data))
    with pytest.raises(ValueError, match="a: its structure is malformed, KeyError: 'list/0'"):
        load(tmp_path / "a")


@pytest.mark.parametrize("length", [0, 2**20, 99_999_999, 10**8 + 1, 2**63, 2**64 - 1])
def test_any_wrong_header_length_raises_a_valueerror(tmp_path, saved, length):
    (tmp_path / "a").write_bytes(struct.pack("<Q", length) + saved[8:])
    for read in READERS.values():
        with pytest.raises(ValueError, match=r"a (is truncated|is not a safetensors|was altered)"):
            read(tmp_path / "a")


def test_text_that_is_not_unicode_is_malformed(tmp_path):
    (tmp_path / "a").write_bytes(container(b'{"\xff\xfe": {}}'))
    with pytest.raises(ValueError, match="a was altered: its header is malformed, UnicodeDecode"):
        load(tmp_path / "a")


def test_a_file_that_shrinks_while_it_is_read_is_truncated(tmp_path, monkeypatch):
    save(tmp_path / "a", {"a": np.ones(50_000), "b": np.ones(50_000)})
    decompress = zlib.decompressobj

    def shrink(*arguments):
        with open(tmp_path / "a", "rb+") as file:
            file.truncate((tmp_path / "a").stat().st_size - 1)
        return decompress(*arguments)

    monkeypatch.setattr(zlib, "decompressobj", shrink)
    with pytest.raises(ValueError, match="a was truncated while 'b' was read"):
        load(tmp_path / "a")
