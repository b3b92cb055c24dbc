"""GGUF files: metadata, tensors, shards, and malformed files of every kind."""

import os
import re
import struct
from typing import Any

import numpy as np
import pytest

from jaxquant.checkpoints.gguf import open_gguf

from .gguf_files import (
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    UINT16,
    UINT32,
    gguf,
    padded,
    pair,
    string,
    tensor,
    value,
)
from .gguf_files import array as float_tensor
from .gguf_files import blocks as golden_tensor


def write(tmp_path, data, name="a.gguf"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def expect_error(tmp_path, data, text, name="a.gguf"):
    path = write(tmp_path, data, name)
    with pytest.raises(ValueError, match=text) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)


def header(n_tensors, n_pairs, rest=b"", version=3):
    return b"GGUF" + struct.pack("<Iqq", version, n_tensors, n_pairs) + rest


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_are_python_values(tmp_path, version):
    pairs = [
        ("text", STRING, "Grüße"),
        ("empty", STRING, ""),
        ("count", UINT32, 7),
        ("negative", INT32, -7),
        ("half", FLOAT32, 0.5),
        ("large", 10, 2**63),
        ("exact", 12, 0.1),
        ("flag", BOOL, 1),
        ("tokens", ARRAY, (STRING, ["a", "", "ü"])),
        ("types", ARRAY, (INT32, [1, -3])),
        ("flags", ARRAY, (BOOL, [0, 1])),
        ("nothing", ARRAY, (UINT32, [])),
    ]
    path = write(tmp_path, gguf(pairs, [float_tensor("x", [1, 2])], version))
    metadata = open_gguf(path).metadata
    assert metadata == {
        "text": "Grüße",
        "empty": "",
        "count": 7,
        "negative": -7,
        "half": 0.5,
        "large": 2**63,
        "exact": 0.1,
        "flag": True,
        "tokens": ["a", "", "ü"],
        "types": [1, -3],
        "flags": [False, True],
        "nothing": [],
    }
    assert type(metadata["flag"]) is bool


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_tensors_start_where_the_alignment_says(tmp_path, alignment):
    q, values = golden_tensor("q", "Q5_0")
    data = gguf(
        [("general.alignment", UINT32, alignment)],
        [float_tensor("x", [1, 2, 3]), q, float_tensor("y", [[4], [5]])],
        alignment=alignment,
    )
    ck: Any = open_gguf(write(tmp_path, data))
    assert list(ck) == ["x", "q", "y"]
    assert ck["x"].value.read().tolist() == [1, 2, 3]
    assert ck["y"].value.read().tolist() == [[4], [5]]
    assert ck["q"].shape == values.shape
    assert "tensors=3" in repr(ck)


def test_the_last_tensor_needs_no_padding(tmp_path):
    data = gguf([], [float_tensor("x", [1, 2, 3])])
    for size in (len(data), len(data) - 7, len(data) - 20):
        ck: Any = open_gguf(write(tmp_path, data[:size]))
        assert ck["x"].value.read().tolist() == [1, 2, 3]


def test_files_without_tensors_are_vocabularies(tmp_path):
    assert len(open_gguf(write(tmp_path, gguf([("a", UINT32, 1)], [])))) == 0


ALIGNED = ("general.alignment", UINT32)
ONE = [float_tensor("x", [1, 2])]
MALFORMED = {
    "empty": (b"", "not a GGUF file"),
    "other": (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
    "only magic": (b"GGUF", "version: 1 x 4 bytes are more than the 0 left"),
    "version 1": (header(0, 0, version=1), "GGUF version 1; versions 2 and 3 are supported"),
    "version 4": (header(0, 0, version=4), "GGUF version 4; versions"),
    "version 0": (header(0, 0, version=0), "GGUF version 0; versions"),
    "big-endian": (b"GGUF" + struct.pack(">Iqq", 3, 0, 0), "big-endian GGUF file"),
    "too many tensors": (header(2**62, 0), "number of tensors: .* are more than the 0 left"),
    "negative tensors": (header(-1, 0), "number of tensors"),
    "too many pairs": (header(0, 2**62), "number of metadata entries"),
    "negative pairs": (header(0, -1), "number of metadata entries"),
    "long key": (header(0, 1, struct.pack("<Q", 2**63) + bytes(20)), "key 0 of the metadata"),
    "empty key": (header(0, 1, pair("", UINT32, 1)), "key 0 of the metadata: '' is empty"),
    "repeated key": (gguf([("a", UINT32, 1)] * 2, []), "key 1 of the metadata: 'a' is .*repeated"),
    "key not UTF-8": (header(0, 1, pair(b"\xff\xfe", UINT32, 1)), "key 0 .*not UTF-8"),
    "text not UTF-8": (gguf([("a", STRING, b"\xff")], []), "value of 'a': not UTF-8"),
    "type of value": (
        header(0, 1, string("a") + struct.pack("<IQ", 13, 0)),
        "value of 'a': values of type 13 do not exist",
    ),
    "nested array": (
        header(0, 1, string("a") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + value(ARRAY, (4, [1]))),
        "value of 'a': values of type 9 as elements of an array",
    ),
    "long array": (
        header(0, 1, string("a") + struct.pack("<IIQ", ARRAY, UINT32, 2**62)),
        "value of 'a': .* left",
    ),
    "long array of texts": (
        header(0, 1, string("a") + struct.pack("<IIQ", ARRAY, STRING, 2**62)),
        "value of 'a': .* left",
    ),
    "bool": (gguf([("a", BOOL, 2)], []), "value of 'a': a bool must be 0 or 1; got 2"),
    "alignment 0": (gguf([(*ALIGNED, 0)], ONE), "general.alignment: must be a power of two"),
    "alignment 24": (gguf([(*ALIGNED, 24)], ONE), "general.alignment: .*got 24"),
    "alignment of another type": (
        gguf([("general.alignment", STRING, "32")], ONE),
        "general.alignment: .*got '32'",
    ),
    "other alignment": (gguf([(*ALIGNED, 4096)], ONE), "bytes of 'x': they end at"),
    "empty name": (gguf([], [float_tensor("", [1])]), "name of tensor 0: '' is empty"),
    "long name": (gguf([], [float_tensor("n" * 64, [1])]), "name of tensor 0: .*too long"),
    "repeated name": (gguf([], ONE * 2), "name of tensor 1: 'x' is repeated"),
    "many axes": (gguf([], [float_tensor("x", np.ones((1,) * 5))]), "number of axes of 'x': 5 is"),
    "no elements": (gguf([], [float_tensor("x", np.ones((0, 2)))]), r"shape of 'x': \(0, 2\)"),
    "negative axis": (gguf([], [("x", (-1,), 0, bytes(4))]), r"shape of 'x': \(-1,\)"),
    "huge": (gguf([], [("x", (2**62,) * 4, 0, bytes(4))]), "bytes of 'x': they end at"),
    "partial block": (gguf([], [("x", (4, 40), 2, bytes(72))]), "multiple of 32, as Q4_0 requires"),
    "scalar block": (gguf([], [("x", (), 2, bytes(18))]), "multiple of 32, as Q4_0 requires"),
    "truncated": (gguf([], [float_tensor("x", np.ones(64))])[:-1], "bytes of 'x': they end at"),
    "extended": (gguf([], ONE) + bytes(1), "end of the tensors: they end at"),
    "offset": (
        padded(header(1, 0, tensor("x", (2,), 0, 32))) + bytes(64),
        "offset of 'x': must be 0; got 32",
    ),
    "unaligned": (
        padded(header(1, 0, tensor("x", (2,), 0, 1))) + bytes(32),
        "offset of 'x': must be 0; got 1",
    ),
    "overlap": (
        padded(header(2, 0, tensor("x", (2,), 0, 0) + tensor("y", (2,), 0, 0))) + bytes(64),
        "offset of 'y': must be 32; got 0",
    ),
    "unknown type": (gguf([], [("x", (32,), 99, bytes(32))]), r"type of 'x': .*99 \(unknown\)"),
    "activations": (gguf([], [("x", (32,), 9, bytes(36))]), r"type of 'x': .*Q8_1.*activations"),
    "sums": (gguf([], [("x", (256,), 15, bytes(292))]), r"type of 'x': .*Q8_K.*activations"),
    "removed": (gguf([], [("x", (32,), 31, bytes(18))]), r"type of 'x': .*Q4_0_4_4.*removed"),
}


@pytest.mark.parametrize("data, text", MALFORMED.values(), ids=MALFORMED)
def test_malformed_files_are_errors_with_name_and_field(tmp_path, data, text):
    expect_error(tmp_path, data, text)


def test_every_truncation_of_the_header_is_an_error(tmp_path):
    pairs = [("a", ARRAY, (STRING, ["b", "cd"])), ("general.alignment", UINT32, 32)]
    data = gguf(pairs, [*ONE, golden_tensor("q", "Q4_K")[0]])
    for size in range(0, 400):
        expect_error(tmp_path, data[:size], "a.gguf")


def test_folders_and_missing_files_are_named(tmp_path):
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        open_gguf(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        open_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize("name", ["x", "q"])
def test_a_file_that_is_truncated_after_it_was_opened(tmp_path, name):
    path = write(
        tmp_path, gguf([], [float_tensor("x", np.ones(5000)), golden_tensor("q", "Q4_0")[0]])
    )
    stored: Any = open_gguf(path)[name]
    os.truncate(path, 100)
    with pytest.raises(
        ValueError, match=r"a\.gguf was truncated after it was opened, from .* to 100"
    ):
        stored.value.read() if name == "x" else stored.value.codes.read()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's counters")
def test_what_was_read_does_not_stay_in_memory(tmp_path):
    def resident():
        with open("/proc/self/status") as file:
            (line,) = (row for row in file if row.startswith("RssFile:"))
        return 1024 * int(line.split()[1])

    array = np.ones((1024, 4096), np.float32)
    stored: Any = open_gguf(write(tmp_path, gguf([], [float_tensor("x", array)])))["x"]
    before = resident()
    np.testing.assert_array_equal(stored.value.read(), array)
    assert resident() - before < array.nbytes / 4


def shard(i, count=3, total=3, tensors=None):
    pairs = [("split.no", UINT16, i), ("split.count", UINT16, count)]
    pairs += [("split.tensors.count", INT32, total)]
    pairs += [("general.architecture", STRING, "llama")] if i == 0 else []
    return gguf(pairs, tensors or [float_tensor(f"x{i}", [i])])


def write_shards(tmp_path, shards):
    names = [f"m-{i + 1:05d}-of-{len(shards):05d}.gguf" for i in range(len(shards))]
    return [write(tmp_path, data, name) for data, name in zip(shards, names, strict=True)]


def test_shards_are_opened_as_one(tmp_path):
    paths = write_shards(tmp_path, [shard(0), shard(1), shard(2)])
    for path in paths:
        ck: Any = open_gguf(path)
        assert [(name, s.value.read().tolist()) for name, s in ck.items()] == [
            ("x0", [0]),
            ("x1", [1]),
            ("x2", [2]),
        ]
        assert ck.metadata["general.architecture"] == "llama"


def test_shards_that_do_not_belong_together_are_errors(tmp_path):
    cases = [
        ([shard(0), shard(2), shard(2)], "split.no: must be 1 in this shard; got 2"),
        ([shard(0), shard(1, count=4), shard(2)], "split.count: must be 3 in this shard; got 4"),
        ([shard(0), gguf([], ONE), shard(2)], "split.count: must be 3 in this shard; got None"),
        ([shard(0, total=4), shard(1), shard(2)], "split.tensors.count: must be 3.*got 4"),
        (
            [shard(0), shard(1, tensors=[float_tensor("x0", [1])]), shard(2)],
            "'x0' is in an earlier",
        ),
    ]
    for shards, text in cases:
        paths = write_shards(tmp_path, shards)
        with pytest.raises(ValueError, match=text):
            open_gguf(paths[0])
    paths[1].unlink()
    with pytest.raises(FileNotFoundError, match="m-00002-of-00003"):
        open_gguf(paths[0])


def test_renamed_shards_are_errors(tmp_path):
    expect_error(
        tmp_path, shard(0), "one of 3 shards, so its name must end in -00001-of-00003.gguf"
    )
    expect_error(tmp_path, shard(0), "Rename the files", "m-00001-of-00002.gguf")
