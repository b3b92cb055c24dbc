"""Sources read slices of files; joined ones read only the parts that a slice needs."""

import os
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest

from jaxquant.checkpoints import Source
from jaxquant.checkpoints.source import concatenate, stack

SETTINGS = hypothesis.settings(max_examples=50, deadline=None, derandomize=True)


def source(array, log=None):
    def reader(index):
        assert all(0 <= s.start <= s.stop <= n for s, n in zip(index, array.shape, strict=True))
        if log is not None:
            log.append(index)
        return np.array(array[index])

    return Source(array.shape, array.dtype, reader)


def numbered(*shape, first=0):
    return np.arange(first, first + np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


@st.composite
def slices_of(draw, shape):
    bounds = [sorted(draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape]
    return tuple(slice(*b) for b in bounds)


@SETTINGS
@hypothesis.given(data=st.data())
def test_joined_sources_read_like_joined_arrays(data):
    lengths = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    axis = data.draw(st.integers(0, 1))
    shapes = [(n, 3) if axis == 0 else (3, n) for n in lengths]
    arrays = [numbered(*shape, first=100 * i) for i, shape in enumerate(shapes)]
    joined = np.concatenate(arrays, axis)
    found = concatenate([source(a) for a in arrays], axis)
    assert (found.shape, found.dtype, found.size) == (joined.shape, joined.dtype, joined.size)
    index = data.draw(slices_of(joined.shape))
    np.testing.assert_array_equal(found.read(index), joined[index])


@SETTINGS
@hypothesis.given(data=st.data())
def test_stacked_sources_read_like_stacked_arrays(data):
    arrays = [numbered(2, 3, first=100 * i) for i in range(3)]
    found, stacked = stack([source(a) for a in arrays]), np.stack(arrays)
    index = data.draw(slices_of(stacked.shape))
    np.testing.assert_array_equal(found.read(index), stacked[index])


@SETTINGS
@hypothesis.given(data=st.data())
def test_repeated_sources_read_like_repeated_arrays(data):
    axis, times = data.draw(st.integers(0, 1)), data.draw(st.integers(1, 4))
    found = source(numbered(2, 3)).repeat(times, axis)
    repeated = numbered(2, 3).repeat(times, axis)
    assert found.shape == repeated.shape
    index = data.draw(slices_of(repeated.shape))
    np.testing.assert_array_equal(found.read(index), repeated[index])


def test_only_the_parts_that_a_slice_needs_are_read():
    logs = [[], [], []]
    sources = [source(numbered(4, 3), log) for log in logs]
    concatenate(sources, 0).read((slice(5, 7), slice(None)))
    assert [len(log) for log in logs] == [0, 1, 0]
    assert logs[1] == [(slice(1, 3), slice(0, 3))]


def test_indices_may_be_open_negative_or_beyond_the_end():
    array = numbered(4, 3)
    np.testing.assert_array_equal(source(array).read(), array)
    index = (slice(-2, 100), slice(None, -1))
    np.testing.assert_array_equal(source(array).read(index), array[index])
    assert source(array).read((slice(3, 1), slice(None))).shape == (0, 3)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.uint4], ids=str)
def test_each_device_gets_its_slice_and_copies_are_read_once(dtype):
    array, log = (numbered(8, 6) % 16).astype(dtype), []
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.NamedSharding(mesh, jax.P("a", None))
    found = source(array, log).put(sharding)
    assert isinstance(found, jax.Array)
    assert found.sharding == sharding
    np.testing.assert_array_equal(np.asarray(found), array)
    # Four slices, each for two devices.
    assert len(log) == 4
    np.testing.assert_array_equal(np.asarray(source(array).put()), array)


def test_another_file_of_the_name_does_not_matter(tmp_path):
    array = numbered(64, 64)
    (tmp_path / "a").write_bytes(array.tobytes())
    mapped = np.memmap(tmp_path / "a", np.float32, "r", shape=array.shape)
    found = Source(array.shape, array.dtype, lambda index: np.array(mapped[index]), mapped)
    np.testing.assert_array_equal(found.read(), array)
    (tmp_path / "b").write_bytes(b"")
    os.replace(tmp_path / "b", tmp_path / "a")
    np.testing.assert_array_equal(found.read(), array)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_pages_that_were_read_are_released(tmp_path):
    array = np.ones(2**24, np.uint8)
    (tmp_path / "a").write_bytes(array.tobytes())
    mapped = np.memmap(tmp_path / "a", np.uint8, "r")
    found = Source(array.shape, array.dtype, lambda index: np.array(mapped[index]), mapped)
    resident = []
    for start in range(0, array.size, 2**21):
        found.read((slice(start, start + 2**21),))
        text = Path("/proc/self/smaps").read_text().partition(str(tmp_path / "a"))[2]
        resident += [int(text.partition("Rss:")[2].split()[0])]
    assert max(resident) < 2**11


def test_arrays_on_devices_do_not_alias_the_file():
    array = numbered(64, 64)
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    for sharding in (None, jax.NamedSharding(mesh, jax.P("a"))):
        found = source(array).put(sharding)
        before = np.array(found)
        array += 1
        np.testing.assert_array_equal(np.asarray(found), before)
