import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import (
    INT4,
    INT8,
    NF4,
    NVFP4,
    ArrayConfig,
    Inputs,
    QTensor,
    dequantize,
    quantize,
)
from jaxquant.core import packed_bytes, scale_values

from .. import cases, checks, oracles
from ..cases import along

few_cases = pytest.mark.parametrize("case", cases.FEW.values(), ids=cases.FEW)
# Orders of an array of three axes: none, the last two swapped, and turns of all three.
ORDERS = [
    ("int4", (-1, -2)),
    ("int4", (-2, -1, -3)),
    ("int4", (-1, -3, -2)),
    ("nvfp4", (-1, -2)),
    ("nvfp4", (-2, -3, -1)),
    ("int8", None),
    ("int8", (-3, -1, -2)),
]
CUBES = {
    "int4": along(1, format=INT4, group_size=4, symmetric=False),
    "nvfp4": along(-1, format=NVFP4),
    "int8": along((0, 2), format=INT8),
}


def cube(name, seed=0):
    x = np.random.default_rng(seed).normal(size=(3, 8, 32)).astype(np.float32)
    return x, quantize(x, *CUBES[name])


@pytest.mark.some_rows(2)
@few_cases
def test_dequantize_is_the_convention_eagerly_as_under_jit(case):
    q = quantize(cases.gaussian(), *case)
    values = q.dequantize()
    np.testing.assert_allclose(values, oracles.dequantize(q), rtol=1e-6)
    np.testing.assert_array_equal(dequantize(q), values)
    np.testing.assert_array_equal(jax.jit(dequantize)(q), values)


def test_eager_dequantize_compiles_one_program_and_is_inlined_in_others(caplog):
    # A shape that no other test has.
    q = quantize(cases.gaussian((11, 96)), *cases.CASES["int4-asym_g32"])
    with jax.log_compiles():
        q.dequantize()
    compiled = [r for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    assert len(compiled) == 1
    # JAX from 0.12 inlines when it lowers, and not when it traces.
    assert "_decode" not in jax.jit(dequantize).lower(q).as_text()


def test_nbytes_includes_the_arrays_of_inputs():
    x, q = cube(next(iter(CUBES)))
    inputs = Inputs(multiplier=jnp.ones(x.shape[0]), scale=jnp.float32(1))
    assert dataclasses.replace(q, inputs=inputs).nbytes == q.nbytes + 4 * x.shape[0] + 4


def test_the_identity_order_is_stored_as_none():
    _, q = cube(next(iter(CUBES)))
    assert q.reorder((-1, -2)).reorder((-2, -1)).order is None


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name, order", ORDERS, ids=str)
def test_an_array_in_another_order_is_the_same_array(name, order):
    x, q = cube(name)
    q = jax.tree.map(np.asarray, q)  # NumPy transposes without compilation.
    other = q.reorder(order)
    assert other.order == order
    assert (other.shape, other.ndim, other.size) == (x.shape, 3, x.size)
    assert other.nbytes == q.nbytes
    stored = other.stored_axes(range(3))
    assert tuple(other.codes.shape[a] for a in stored) == x.shape
    assert other.stored_axes((-1, -2, -3)) == stored[::-1]
    np.testing.assert_array_equal(other.dequantize(), q.dequantize())
    np.testing.assert_array_equal(oracles.dequantize(other), oracles.dequantize(q))
    np.testing.assert_array_equal(np.transpose(other.decode(), stored), q.dequantize())
    checks.assert_equal_quantized(other.reorder(None), q)


def test_order_says_which_axis_is_stored_where():
    _, q = cube("int8")
    assert q.reorder((-1, -3, -2)).codes.shape == (32, 3, 8)
    assert q.reorder((-2, -1, -3)).codes.shape == (8, 32, 3)
    assert q.reorder((-1, -2)).codes.shape == (3, 32, 8)
    assert q.reorder((-1, -2)).scale.shape == (1, 1, 8)
    assert q.reorder((-1, -2)).stored_axes((0, 1, 2)) == (0, 2, 1)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_reordering_twice_is_reordering_once(data):
    length = st.integers(0, 4).flatmap(lambda n: st.permutations(range(-n, 0)).map(tuple))
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    q = quantize(x, ArrayConfig(format=INT4, group_size=2, symmetric=False), axis=-2)
    q = jax.tree.map(np.asarray, q)  # NumPy transposes without compilation.
    first, second = data.draw(length), data.draw(length)
    twice = q.reorder(first).reorder(second)
    checks.assert_equal_quantized(twice, q.reorder(second))
    assert twice.shape == x.shape
    np.testing.assert_array_equal(oracles.dequantize(twice), oracles.dequantize(q))


@pytest.mark.parametrize("order", [(0, 1), (-1, -1), (-1, -3), (-2,), (-1, -2, -3, -4)], ids=str)
def test_an_order_must_be_a_permutation_of_trailing_axes(order):
    _, q = cube("int8")
    message = rf"order must be a permutation.*got \({order[0]}.* for 3 axes\. \(-1, -2\) swaps"
    with pytest.raises(ValueError, match=message):
        q.reorder(order)


@pytest.mark.parametrize(
    "case, order", [(CUBES["int4"], (-1, -2)), (along(-1, format=NF4), None)], ids=str
)
def test_a_stack_is_scanned_sliced_and_vmapped_like_any_pytree(case, order):
    x = np.random.default_rng(0).normal(size=(3, 8, 32)).astype(np.float32)
    q = quantize(x, *case).reorder(order)
    vector = np.arange(32, dtype=np.float32)
    expected = [oracles.dequantize(q)[i] @ vector for i in range(3)]

    def step(carry, row):
        assert row.shape == (8, 32)
        return carry, jnp.matmul(row.dequantize(), vector)

    _, scanned = jax.lax.scan(step, 0, q)
    np.testing.assert_allclose(scanned, expected, rtol=1e-4, atol=1e-4)
    vmapped = jax.vmap(lambda row: jnp.matmul(row.dequantize(), vector))(q)
    np.testing.assert_allclose(vmapped, expected, rtol=1e-4, atol=1e-4)
    slices = [jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], q) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *slices)
    checks.assert_equal_quantized(stacked, q)


def with_scale(q, scale):
    return dataclasses.replace(q, scale=scale)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", ["int8-row", "int4-asym_g32", "nf4-g64", "fp8_e4m3-blocks"])
def test_gradients_with_respect_to_scales_are_sums_of_codes(name):
    x = cases.gaussian()
    q = quantize(x, *cases.CASES[name])
    cotangent = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def loss(scale):
        return jnp.sum(with_scale(q, scale).dequantize() * cotangent)

    values = oracles.code_values(q.codes, q.format)
    values = values - oracles.repeat_groups(checks.zero_point_of(q), x.shape)
    expected = np.zeros(q.scale.shape)
    for index, where in oracles.blocks(x.shape, *cases.CASES[name])[1]:
        expected[index] = np.sum(values[where] * cotangent[where])
    got = jax.jit(jax.grad(loss))(q.scale)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_gradients_reach_the_top_scale_of_nested_scales():
    x = cases.gaussian()
    q = quantize(x, ArrayConfig(format=NVFP4), axis=1)

    def loss(top):
        return jnp.sum(with_scale(q, with_scale(q.scale, top)).dequantize())

    assert isinstance(q.scale, QTensor)
    top = jnp.asarray(q.scale.scale)
    # The values are linear in it.
    value, got = jax.jit(jax.value_and_grad(loss))(top)
    np.testing.assert_allclose(got * top, value, rtol=1e-4)


def test_equal_static_fields_share_one_compilation():
    traces = []

    @jax.jit
    def f(q):
        traces.append(q)
        return q.dequantize()

    for seed in range(3):
        f(quantize(cases.gaussian(seed=seed), ArrayConfig(), axis=1))
    assert len(traces) == 1
    f(quantize(cases.gaussian(), ArrayConfig(), axis=1).astype("bfloat16"))
    assert len(traces) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_astype_changes_the_dequantized_dtype_but_not_the_codes(dtype):
    q = quantize(cases.gaussian(), ArrayConfig(), axis=1)
    cast = q.astype(dtype)
    assert cast.dequantize().dtype == cast.dtype == dtype
    assert cast.codes is q.codes
    np.testing.assert_array_equal(cast.dequantize(), np.asarray(q.dequantize()).astype(dtype))


def test_a_qtensor_rebuilds_from_placeholders():
    q = quantize(cases.gaussian(), *cases.CASES["nvfp4-row"])
    q = dataclasses.replace(q, inputs=Inputs(ArrayConfig(), jnp.ones(()), multiplier=jnp.ones(3)))
    leaves, structure = jax.tree.flatten(q)
    assert len(leaves) == 5
    assert jax.tree.structure(jax.tree.unflatten(structure, [object()] * 5)) == structure
    assert jax.tree.unflatten(structure, leaves).inputs.config == ArrayConfig()
    again = jax.eval_shape(lambda q: q, q)
    assert isinstance(again, QTensor)
    assert again.shape == q.shape
    assert jax.eval_shape(dequantize, q).shape == q.shape


@pytest.mark.parametrize("shape, dtype, expected", [
    ((3,), "int4", 2),
    ((5,), "int2", 2),
    ((3, 3), "float4_e2m1fn", 5),
    ((), "float32", 4),
    ((0, 3), "int4", 0),
    ((3, 5), "uint4", 8),
    ((7,), "bfloat16", 14),
    ((3,), "bool", 3),
    ((2,), "complex64", 16),
])  # fmt: skip
def test_bytes_count_codes_of_less_than_a_byte_at_their_bits(shape, dtype, expected):
    assert packed_bytes(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))) == expected


def test_the_repr_names_format_shape_scales_and_dtype():
    _, q = cube("int8")
    assert repr(q) == "QTensor(int8 3x8x32, scale (1, 8, 1), float32)"
    assert repr(q.reorder((-1, -2))) == "QTensor(int8 3x8x32, scale (1, 1, 8), float32)"


def test_scale_values_are_floats_to_compute_with():
    x = cases.gaussian()
    narrow = quantize(x, ArrayConfig(scale_dtype="bfloat16"), axis=1)
    assert scale_values(narrow.scale).dtype == "float32"
    nested = quantize(x, ArrayConfig(format=NVFP4), axis=1)
    np.testing.assert_allclose(scale_values(nested.scale), oracles.dequantize(nested.scale), 1e-6)
    with jax.enable_x64(True):
        wide = quantize(x.astype("float64"), ArrayConfig(scale_dtype="float64"), axis=1)
        assert scale_values(wide.scale).dtype == wide.dequantize().dtype == "float64"


@pytest.mark.parametrize("name", ["fp8_e5m2-g64", "nvfp4-row"])
def test_only_wide_scales_get_gradients_not_codes_or_narrow_scales(name):
    q = quantize(cases.gaussian(), *cases.CASES[name])
    gradient = jax.jit(jax.grad(lambda q: jnp.sum(jnp.sin(q.dequantize()))))(q)
    for leaf in jax.tree.leaves(gradient):
        is_wide = leaf.dtype == jnp.float32
        assert np.any(np.asarray(leaf).astype(np.float32) != 0) == is_wide


AS_ARRAYS = {
    "np.asarray": lambda q: np.asarray(q),
    "np.array of a dtype": lambda q: np.array(q, dtype=np.float32),
    "jnp.asarray": jnp.asarray,
    "jnp.dot": lambda q: jnp.dot(jnp.ones((2, 64)), q),
    "jnp.matmul": lambda q: jnp.matmul(q, jnp.ones((256, 2))),
    "@": lambda q: jnp.ones((2, 64)) @ q,
    "+": lambda q: jnp.ones((64, 256)) + q,
    "under jit": lambda q: jax.jit(lambda x, q: jnp.dot(x, q))(jnp.ones((2, 64)), q),
}


@pytest.mark.parametrize("name", AS_ARRAYS)
def test_numpy_functions_raise_and_name_the_replacement(name):
    q = quantize(cases.gaussian(), ArrayConfig())
    with pytest.raises(
        TypeError, match=r"A QTensor is not an array.*jq\.matmul.*q\.dequantize\(\)"
    ):
        AS_ARRAYS[name](q)


@pytest.mark.parametrize("name", ["int8-row", "int8-asym_tensor", "nvfp4-row"])
def test_an_infinite_scale_is_not_hidden(name):
    q = quantize(cases.gaussian(), *cases.CASES[name])
    if isinstance(q.scale, QTensor):
        scale = dataclasses.replace(q.scale, scale=np.full(q.scale.scale.shape, np.inf, "f4"))
    else:
        scale = np.full(q.scale.shape, np.inf, "f4")
    assert not np.isfinite(dataclasses.replace(q, scale=scale).dequantize()).any()
