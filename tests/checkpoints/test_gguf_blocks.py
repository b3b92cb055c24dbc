"""Every type of ggml, against the values that ggml's own decoder gives."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import checkpoints
from jaxquant.checkpoints.gguf import open_gguf
from jaxquant.checkpoints.gguf.block_table import BLOCK_TYPES
from jaxquant.checkpoints.gguf.block_type import bit_places
from jaxquant.core import packed_bytes

from .ggml import NAMES
from .gguf_files import NEGATIVE_ZEROS, gguf, golden, is_source, values_of
from .gguf_files import blocks as golden_tensor

QUANTIZED = [t.name for t in BLOCK_TYPES.values() if t.format is not None]
WRITTEN = [t.name for t in BLOCK_TYPES.values() if t.format is not None and t.is_written]
each_type = pytest.mark.parametrize("name", QUANTIZED)
# Types that may hold bits that decoding ignores, or that do not arrange bits only.
NOT_BITS = ("NVFP4", "TQ1_0")


def opened(tmp_path, name, rows=2) -> tuple[Any, Any]:
    tensor, values = golden_tensor("w", name, rows)
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(gguf([], [tensor]))
    return open_gguf(path)["w"], values


def assert_same_bits(actual, wanted, ignore_sign_of_zero=False):
    actual = np.asarray(actual)
    if ignore_sign_of_zero:
        actual, wanted = (np.where(x == 0, np.float32(0), x) for x in (actual, wanted))
    assert actual.dtype == wanted.dtype == np.float32
    np.testing.assert_array_equal(actual.view(np.uint32), wanted.view(np.uint32))


def test_the_golden_file_has_every_type():
    assert set(QUANTIZED) == set(NAMES.values())
    assert all(NAMES[t.number] == t.name for t in BLOCK_TYPES.values() if t.format)


@pytest.mark.some_rows(2)
@each_type
def test_values_equal_those_of_ggml_bit_for_bit(tmp_path, name):
    stored, values = opened(tmp_path, name)
    assert (stored.name, stored.kind, stored.shape) == ("w", name, values.shape)
    assert stored.nbytes == golden(name)[1].size
    q = checkpoints.put(stored.value)
    ignore = name in NEGATIVE_ZEROS
    assert_same_bits(q.dequantize(), values, ignore)
    assert_same_bits(jax.jit(lambda q: q.dequantize())(q), values, ignore)


@each_type
def test_the_arrays_have_the_dtypes_that_their_formats_say(tmp_path, name):
    q = opened(tmp_path, name)[0].value
    for part in (q, q.scale, q.offset):
        if hasattr(part, "format"):
            assert part.codes.dtype == jnp.dtype(part.format.dtype)
            codes = part.codes.read()
            book = part.format.codebook
            values = np.asarray(book)[codes.astype(int)] if book else codes.astype(np.float32)
            assert part.format.codebook or values.min() >= min(part.format.qmin, -128)
            assert values.max() <= part.format.qmax


@each_type
def test_slices_equal_slices_of_the_whole(tmp_path, name):
    value = opened(tmp_path, name, rows=4)[0].value
    for source in jax.tree.leaves(value, is_leaf=is_source):
        whole = source.read()
        assert whole.shape == source.shape
        rng = np.random.default_rng(0)
        for _ in range(8):
            starts, stops = np.sort([rng.integers(0, n + 1, 2) for n in whole.shape]).T
            index = tuple(slice(a, b) for a, b in zip(starts, stops, strict=True))
            part = source.read(index)
            assert part.dtype == source.dtype
            assert part.tobytes() == whole[index].tobytes()


def test_slices_decode_only_the_blocks_that_cover_them(tmp_path, monkeypatch):
    stored, values = opened(tmp_path, "Q4_0")
    seen = []
    leaf = type(BLOCK_TYPES[2].codes)
    decode = leaf.decode
    monkeypatch.setattr(leaf, "decode", lambda self, b: seen.append(b.shape) or decode(self, b))
    stored.value.codes.read((slice(1, 2), slice(40, 65)))
    assert seen == [(2, 18)]
    assert values.shape == (2, 256)


def test_arrays_read_are_copies(tmp_path):
    stored, _values = opened(tmp_path, "Q8_0")
    for source in jax.tree.leaves(stored.value, is_leaf=is_source):
        assert source.read().flags.writeable
        assert source.read().base is None or source.read().base.flags.writeable


@pytest.mark.parametrize("name", [n for n in WRITTEN if n not in NOT_BITS])
def test_every_bit_of_a_block_is_one_bit_of_one_array(name):
    (type,) = (t for t in BLOCK_TYPES.values() if t.name == name)
    fields = np.concatenate(bit_places(type), -1)
    assert fields.shape[0] == 8 * type.nbytes
    is_one_bit = (fields & (fields - 1) == 0) & (fields > 0)
    assert (is_one_bit.sum(-1) == 1).all()
    assert ((fields > 0).sum(-1) == 1).all()
    assert (type.codes.count, type.codes.decode(np.zeros((3, type.nbytes), np.uint8)).shape) == (
        type.elements,
        (3, type.elements),
    )


def test_scales_of_mxfp4_at_the_ends_of_their_range(tmp_path):
    codes = np.arange(16, dtype=np.uint8) | np.arange(16, dtype=np.uint8) << 4
    rows = [bytes([scale]) + codes.tobytes() for scale in (0, 1, 2, 252, 254, 255)]
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf([], [("w", (6, 32), 39, b"".join(rows))]))
    stored: Any = open_gguf(path)["w"]
    assert "XLA flushes them" in stored.note
    values = values_of(stored).astype(np.float64)[:, :16]
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
    e2m1 = np.concatenate([e2m1, -e2m1])
    np.testing.assert_array_equal(values[2], e2m1 * 2.0**-125)
    np.testing.assert_array_equal(values[3], e2m1 * 2.0**125)
    is_subnormal = np.abs(e2m1) * 2.0**-126 < 2.0**-126
    np.testing.assert_array_equal(values[1], np.where(is_subnormal, 0, e2m1 * 2.0**-126))
    largest = float(np.finfo(np.float32).max)
    np.testing.assert_array_equal(values[4], np.clip(e2m1 * 2.0**127, -largest, largest))
    assert np.isnan(values[5]).all()
    # The scale itself is subnormal.
    assert (np.abs(values[0]) <= 2.0**-124).all()


def test_scales_of_nvfp4_that_are_no_numbers(tmp_path):
    codes = np.full(32, 0x22, np.uint8).tobytes()
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf([], [("w", (64,), 40, bytes([0x7F, 0xFF, 0x80, 0xB8]) + codes)]))
    values = values_of(open_gguf(path)["w"]).reshape(4, 16)
    assert values[:, 0].tolist() == pytest.approx([0, np.nan, 0, 1], nan_ok=True)
    assert (values == values[:, :1]).sum() == 48


TABLE = pathlib.Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_the_table_in_the_documentation_has_every_type_and_its_size(tmp_path):
    rows = [[c.strip() for c in r.split("|")[1:-1]] for r in TABLE.read_text().splitlines()]
    rows = {name: row for row in rows if len(row) == 6 for name in row[0].split(", ")}
    assert set(QUANTIZED) <= set(rows)
    for name in QUANTIZED:
        names, _, _, bits, exact, checked_by = rows[name]
        stored, values = opened(tmp_path, name, rows=1)
        leaves = jax.tree.leaves(stored.value, is_leaf=is_source)
        measured = 8 * sum(packed_bytes(leaf) for leaf in leaves) / values.size
        wanted = dict(zip(names.split(", "), 3 * bits.split(", "), strict=False))[name]
        assert float(wanted) == pytest.approx(measured, abs=0.006), name
        assert (exact == "yes") == stored.is_exact
        assert ("round trip" in checked_by) == (name in WRITTEN)


PLAIN = [
    (0, np.float32),
    (1, np.float16),
    (30, jnp.bfloat16),
    (28, np.float64),
    (24, np.int8),
    (25, np.int16),
    (26, np.int32),
    (27, np.int64),
]


@pytest.mark.parametrize("number, dtype", PLAIN, ids=lambda p: getattr(p, "__name__", str(p)))
@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 5)], ids=str)
def test_plain_arrays_are_read_as_they_are(tmp_path, number, dtype, shape):
    dtype = np.dtype(dtype)
    size = int(np.prod(shape))
    content = np.random.default_rng(0).integers(0, 100, size).astype(dtype).reshape(shape)
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf([], [("x", shape, number, content.tobytes())]))
    stored: Any = open_gguf(path)["x"]
    assert stored.is_exact
    read = stored.value.read()
    assert (read.shape, read.dtype) == (shape, dtype)
    assert read.tobytes() == content.tobytes()
    if shape == (3, 4, 5):
        index = (slice(1, 3), slice(0, 2), slice(2, 4))
        np.testing.assert_array_equal(stored.value.read(index), content[index])
