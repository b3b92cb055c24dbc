import collections
import json
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxquant import INT4, NF4, ArrayConfig, quantize
from jaxquant.tree.manifest import Decoder, Encoder

from .trees import Dense, Module, State, assert_equal_trees, leaves_of, normal


def round_trip(tree):
    """Encodes to JSON text and arrays, and decodes. Returns the tree and the encoder."""
    encoder = Encoder()
    text = json.dumps([encoder.encode(tree), encoder.statics])
    node, statics = json.loads(text)
    # Arrays read from a file are row-major and share no memory.
    stored = {k: np.array(v, order="C") for k, v in encoder.arrays.items()}
    return Decoder(statics, stored.__getitem__).decode(node), encoder


DTYPES = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128", "bfloat16"),
    *("int2", "uint2", "int4", "uint4", "float4_e2m1fn"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
]
BITS = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}


def every_code(dtype, shape):
    """An array whose elements are successive bit patterns."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    bits = BITS.get(dtype.name, 8 * dtype.itemsize)
    bits = 1 if dtype.kind == "b" else bits
    codes = np.random.default_rng(0).integers(0, 2 ** min(bits, 62), math.prod(shape))
    if dtype == np.complex128:
        return (codes + 1j * codes[::-1]).reshape(shape)
    if dtype.name.lstrip("u") in ("int2", "int4"):
        return codes.astype(np.int8).astype(dtype).reshape(shape)
    return codes.astype(f"u{dtype.itemsize}").view(dtype).reshape(shape)


# Every shape in a dtype of 32, of 8 and of 4 bits, and every dtype in a shape of odd length.
SHAPES = [(), (0, 3), (1,), (3, 5), (2, 3, 4)]
OF_SHAPES = [(d, shape) for d in ("float32", "float8_e4m3fn", "int4") for shape in SHAPES]


@pytest.mark.some_rows(9)
@pytest.mark.parametrize(("dtype", "shape"), [*((d, (7,)) for d in DTYPES), *OF_SHAPES], ids=str)
def test_arrays_of_every_dtype_round_trip_bit_for_bit(dtype, shape):
    x = every_code(dtype, shape)
    found, encoder = round_trip({"x": x})
    assert found["x"].dtype == x.dtype
    assert np.asarray(found["x"]).tobytes() == x.tobytes()
    assert found["x"].shape == shape
    # JAX would truncate 64 bits; all other arrays are on the device.
    is_wide = dtype in ("int64", "uint64", "float64", "complex128")
    assert isinstance(found["x"], np.ndarray if is_wide else jax.Array)
    per_element = BITS.get(dtype, 8 * x.dtype.itemsize)
    assert encoder.arrays["x"].nbytes == -(-x.size * per_element // 8)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4", "float8_e4m3fn"])
def test_arrays_not_in_row_major_order_round_trip(dtype):
    x = np.asarray(jnp.asarray(normal(6, 8)).astype(dtype))
    views = {
        "transposed": x.T,
        "sliced": x[::2, 1::3],
        "reversed": x[::-1],
        "by columns": np.asfortranarray(x),
    }
    found, encoder = round_trip(views)
    assert all(array.flags.c_contiguous for array in encoder.arrays.values())
    for name, view in views.items():
        np.testing.assert_array_equal(np.asarray(found[name]), view)


def test_arrays_of_the_other_byte_order_round_trip():
    x = normal(5).astype(">f4")
    found, encoder = round_trip({"x": x, "wide": x.astype(">f8")})
    assert encoder.arrays["x"].dtype == np.dtype("<f4")
    for name in ("x", "wide"):
        assert found[name].dtype.name == {"x": "float32", "wide": "float64"}[name]
        np.testing.assert_array_equal(found[name], x)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        -3,
        2**70,
        1.5,
        math.inf,
        -0.0,
        1e-310,
        "",
        "a/b",
        "é\n\"'\\\u2028\ud800",
    ],
)
def test_values_round_trip_with_their_type(value):
    found, encoder = round_trip([value])
    assert found == [value]
    assert type(found[0]) is type(value)
    assert math.copysign(1, found[0]) == math.copysign(1, value) if value == 0 else True
    assert encoder.arrays == {}


def test_nan_round_trips():
    assert math.isnan(round_trip(math.nan)[0])


@pytest.mark.parametrize(
    "tree",
    [
        {},
        [],
        (),
        None,
        {"a": {}, "b": [], "c": (), "d": None},
        {3: {"é": (1, [2, (3,)])}, "a": 2, "z": 1},
        [(1, [2, {"a": ()}]), ()],
        {True: 1, "True": 2},
    ],
    ids=str,
)
def test_containers_round_trip_with_their_types_and_sorted_keys(tree):
    found, _ = round_trip(tree)
    assert found == tree
    assert repr(found) == repr(tree)


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)
) | st.integers(0, 9).map(lambda n: np.arange(n, dtype=np.float32))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3) | st.integers(-2, 2), inner, max_size=3),
    ),
    max_leaves=10,
)


def as_lists(tree):
    """A tree that can be compared: arrays as lists, containers with their kind."""
    if isinstance(tree, dict):
        return ("dict", {k: as_lists(v) for k, v in tree.items()})
    if isinstance(tree, list | tuple):
        return (type(tree).__name__, [as_lists(v) for v in tree])
    return np.asarray(tree).tolist() if hasattr(tree, "dtype") else (type(tree), tree)


@pytest.mark.slow
@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(tree=trees)
def test_any_tree_round_trips(tree):
    found, encoder = round_trip(tree)
    assert as_lists(found) == as_lists(tree)
    assert "__metadata__" not in encoder.arrays


def test_other_containers_become_dicts_of_their_children():
    tree = {
        "tuple": Dense(np.ones(2, np.float32), None),
        "module": Module(np.ones(1, np.float32), {"a": 1}),
        "state": State({"b": 1, "a": (2, 3)}),
        "ordered": collections.OrderedDict(z=1, a=2),
    }
    found, _ = round_trip(tree)
    assert list(found["tuple"]) == ["kernel", "bias"]
    assert found["tuple"]["bias"] is None
    assert found["module"]["bias"] == {"a": 1}
    assert found["state"] == {"b": 1, "a": (2, 3)}
    assert list(found["ordered"]) == ["z", "a"]
    assert leaves_of(found).keys() == leaves_of(tree).keys()


def test_leaves_with_equal_paths_get_different_names():
    tree = {"a/b": np.ones(2), "a": {"b": np.zeros(2)}}
    found, encoder = round_trip(tree)
    assert_equal_trees(found, tree)
    assert set(encoder.arrays) == {"a/b", "a/b'"}
    found, _ = round_trip({1: np.ones(1), "1": np.zeros(1)})
    assert (list(found), found[1], found["1"]) == ([1, "1"], 1, 0)


def test_leaves_do_not_use_names_reserved_by_the_header():
    found, encoder = round_trip({"__metadata__": np.ones(2)})
    assert list(encoder.arrays) == ["__metadata__'"]
    assert list(found) == ["__metadata__"]


def test_a_lone_array_has_a_name():
    found, encoder = round_trip(np.ones(3, np.float32))
    np.testing.assert_array_equal(found, np.ones(3))
    assert list(encoder.arrays) == ["array"]


def test_shared_static_parts_are_written_once():
    q, other = (quantize(normal(8, 4), ArrayConfig(format=f)) for f in (INT4, NF4))
    tree = {"layers": [q] * 5, "other": other, "swapped": q.reorder((-1, -2))}
    found, encoder = round_trip(tree)
    assert_equal_trees(found, tree)
    assert len(encoder.statics) == 3


@pytest.mark.parametrize(
    "tree, text",
    [
        ({"a": [object()]}, "a/0: a leaf must be an array, a QTensor, .* got object"),
        (object(), "The tree: a leaf must be an array, a QTensor, a number, .* got object"),
        ({"a": 1j}, "a: a leaf must be an array, .* got complex"),
        ({"a": b"x"}, "a: a leaf must be an array, .* got bytes"),
        ({"a": {1, 2}}, "a: a leaf must be an array, .* got set"),
        (
            {"a": jax.ShapeDtypeStruct((2,), jnp.float32)},
            "a: a leaf must be an array, .* got ShapeDtypeStruct",
        ),
        ({"a": {(1, 2): 3}}, r"a: keys must be str or int; got \(1, 2\)"),
        ({None: 3}, "The tree: keys must be str or int; got None"),
        (
            {"a": jax.random.key(0)},
            r"a: a key array cannot be saved, got key<fry>. Save jax.random.key_data",
        ),
        (
            {"a": np.array(["x"])},
            r"a: an array of <U1, shape \(1,\), cannot be saved. Convert it to a dtype that JAX",
        ),
        (np.array([None]), r"The tree: an array of object, shape \(1,\), cannot be saved"),
        ({"a": np.ones(2, "M8[s]")}, r"a: an array of datetime64\[s\], shape \(2,\), cannot be"),
        ({"a": np.ones(2, "f4,f4")}, r"a: an array of \[.*\], shape \(2,\), cannot be saved"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_the_error_names_what_cannot_be_saved(tree, text):
    with pytest.raises(ValueError, match=text):
        Encoder().encode(tree)
