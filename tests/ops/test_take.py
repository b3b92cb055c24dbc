from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import FP8_E4M3, INT4, NVFP4, SCHEMES, W8A16, ArrayConfig, Rule, quantize, take
from jaxquant.training import lora_init

from ..cases import Case
from .products import normal, quantized

TABLE = normal(50, 32)
CONFIGS = {
    "per row": Case(ArrayConfig(), 1),
    "per column": Case(ArrayConfig()),
    "tensor": Case(ArrayConfig(per_tensor=True)),
    "groups": Case(ArrayConfig(format=INT4, group_size=16), 1),
    "groups of rows": Case(ArrayConfig(group_size=10, symmetric=False)),
    "blocks": Case(ArrayConfig(group_size=(5, 8)), (0, 1)),
    "nested": Case(ArrayConfig(format=NVFP4), 1),
    "nested along the rows": Case(
        ArrayConfig(format=INT4, group_size=10, scale_dtype="float8_e4m3fn")
    ),
}
# Inside, at both ends, counted from the end, and out of bounds on either side.
INDICES = np.array([[0, 49, -1, 31], [50, -51, 7, 32], [-50, -33, 300, -300]])


def assert_same(got, want):
    """The same numbers, shape and dtype; NaN equals NaN."""
    assert got.dtype == want.dtype
    # NumPy does not know the NaN of bfloat16.
    got, want = (np.asarray(x).astype(np.float32) for x in (got, want))
    np.testing.assert_array_equal(got, want)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", CONFIGS)
def test_take_equals_jnp_take_from_the_dequantized_array(name):
    # Stored in either order.
    q = quantized(TABLE, *CONFIGS[name]).reorder((-1, -2) if len(name) % 2 else None)

    @jax.jit
    def both(q, indices):
        modes = [("fill", 0), ("clip", 0), ("wrap", 0), (None, 1), ("wrap", -1), ("clip", None)]
        values = q.dequantize()
        return [
            (take(q, indices, a, mode=m), jnp.take(values, indices, a, mode=m)) for m, a in modes
        ]

    for got, want in both(q, INDICES):
        assert_same(got, want)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("indices", [7, -3, [], [[]], [3], np.zeros((2, 0, 3)), np.ones((2, 1, 3))])
def test_indices_of_every_shape_match(indices):
    q = quantized(normal(4, 10, 6), ArrayConfig(), axis=2).reorder((-2, -1))

    @jax.jit
    def both(q, indices):
        values = q.dequantize()
        return [(take(q, indices, a), jnp.take(values, indices, a)) for a in range(-3, 3)]

    for got, want in both(q, np.asarray(indices, np.int32)):
        assert_same(got, want)


def test_an_index_may_be_a_python_number():
    q = quantized(normal(4, 10, 6), ArrayConfig(), axis=2)
    assert_same(take(q, 7, axis=1), jnp.take(q.dequantize(), 7, axis=1))


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "uint32"])
def test_narrow_and_unsigned_indices_reach_long_axes(dtype):
    # Longer than what 16 bits hold, with and without a sign.
    q = quantized(normal(70000, 2), ArrayConfig(), axis=1)
    info = np.iinfo(dtype)
    indices = np.array([0, 3, 100, info.max, max(info.min, -70000), max(info.min, -100)])
    indices = np.minimum(indices, 69999)

    modes = ("fill", "clip", "wrap")
    found = jax.jit(lambda q, i: [take(q, i, 0, mode=mode) for mode in modes])
    of_floats = jax.jit(lambda q, i: [jnp.take(q.dequantize(), i, 0, mode=m) for m in modes])

    got, wanted = found(q, indices.astype(dtype)), of_floats(q, indices.astype(np.int32))
    for one, other in zip(got, wanted, strict=True):
        assert_same(one, other)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("fill_value", [0.0, -2.5, None])
def test_indices_out_of_bounds_are_filled(fill_value):
    q = quantized(TABLE.astype(jnp.bfloat16), *CONFIGS["groups"])
    got = jax.jit(partial(take, indices=INDICES, axis=0, fill_value=fill_value))(q)
    wanted = jax.jit(lambda q: jnp.take(q.dequantize(), INDICES, 0, fill_value=fill_value))(q)
    assert_same(got, wanted)
    got = np.asarray(got).astype(np.float32)
    is_filled = np.isnan(got) if fill_value is None else got == fill_value
    assert is_filled.all(-1).sum() == 4, "50, -51, 300 and -300"


def test_an_empty_axis_gives_empty_results_and_no_others():
    q = quantize(np.zeros((0, 8), np.float32), ArrayConfig(), axis=1)
    assert take(q, np.zeros((0,), np.int32), 0).shape == (0, 8)
    with pytest.raises(IndexError, match=r"non-empty jnp\.take"):
        take(q, np.zeros((1,), np.int32), 0)


def test_only_the_taken_rows_are_dequantized():
    q = quantized(TABLE, *CONFIGS["groups"])
    text = jax.jit(lambda q, i: take(q, i, 0)).lower(q, INDICES).as_text()
    assert "50x32xf32" not in text
    assert "50x2x16xf32" not in text


def test_gradients_go_to_the_scales_and_not_to_the_codes():
    q = quantized(TABLE, ArrayConfig(format=FP8_E4M3), axis=1)

    @jax.jit
    def gradients(q):
        rows, flat = (partial(take, indices=np.array([3, 3, 7]), axis=axis) for axis in (0, None))
        return [jax.grad(lambda q, f=f: jnp.sum(f(q)))(q) for f in (rows, flat)]

    gradient, flat = gradients(q)

    want = np.zeros((50, 1))
    want[3] = 2 * np.sum(np.asarray(q.codes, np.float64)[3])
    want[7] = np.sum(np.asarray(q.codes, np.float64)[7])
    np.testing.assert_allclose(gradient.scale, want, rtol=1e-5)
    for codes in (gradient.codes, flat.codes):
        np.testing.assert_array_equal(np.asarray(codes).astype(np.float32), 0)
    assert np.asarray(flat.scale)[0] != 0


def test_take_works_under_vmap_and_on_plain_arrays():
    q = quantized(TABLE, *CONFIGS["nested"])
    rows = jax.jit(jax.vmap(lambda i: take(q, i, 0)))(np.arange(5))
    assert_same(rows, np.asarray(q.dequantize())[:5])
    want = jnp.take(TABLE, INDICES, 0, mode="wrap")
    assert_same(take(jnp.asarray(TABLE), INDICES, 0, mode="wrap"), want)
    one = quantized(TABLE, *CONFIGS["groups"])
    stack = jax.tree.map(lambda a: np.stack([a, a]), one)
    out = jax.jit(jax.vmap(lambda q: take(q, np.array([4, 2]), 0)))(stack)
    assert_same(np.asarray(out)[1], np.asarray(one.dequantize())[[4, 2]])


def test_invalid_arguments_raise():
    q = quantized(TABLE, *CONFIGS["per row"])
    with pytest.raises(ValueError, match=r"indices must be integers; got float32\. Cast"):
        take(q, np.ones(3, np.float32), 0)
    with pytest.raises(
        ValueError,
        match="mode must be one of fill, clip, wrap, promise_in_bounds, or None; got 'cl",
    ):
        take(q, INDICES, 0, mode="clamp")
    for axis in (2, -3):
        with pytest.raises(ValueError, match=rf"an axis of shape \(50, 32\); got {axis}"):
            take(q, INDICES, axis)


def test_hints_and_a_traced_fill_value_are_taken():
    q = quantized(np.arange(12, dtype=np.float32).reshape(6, 2), ArrayConfig(), axis=1)
    taken = take(q, jnp.array([0, 2, 9]), 0, indices_are_sorted=True, fill_value=jnp.float32(7))
    values = np.asarray(q.dequantize())
    np.testing.assert_array_equal(taken, np.stack([values[0], values[2], np.full(2, 7)]))
    inside = take(q, jnp.array([1, 5]), 0, mode="promise_in_bounds", unique_indices=True)
    np.testing.assert_array_equal(inside, values[[1, 5]])


def explicit_mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)


# Of the result (4, 2, 256). The rows are split over "a", the columns over "b".
PLACES = [jax.P("b"), jax.P("b", None, "a"), jax.P(None, "a", "b"), jax.P()]


STORED = [(s, (-1, -2)) for s in ("W8A16", "W4A16_ASYM", "NF4A16", "NVFP4A16")]


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("scheme, order", [*STORED, ("W4A16", None)])
def test_the_result_of_take_lies_where_out_sharding_says(scheme, order):
    q = quantized(normal(64, 256), SCHEMES[scheme].weights, axis=1)
    indices = jnp.arange(8).reshape(4, 2) * 9 - 3
    want, stored = jnp.take(q.dequantize(), indices, 0), ("a", "b") if order is None else ("b", "a")
    with jax.set_mesh(explicit_mesh()):
        sizes = jax.sharding.get_abstract_mesh().shape

        def place(leaf):
            names = zip(leaf.shape, stored[: leaf.ndim], strict=True)
            spec = jax.P(*[name if n % sizes[name] == 0 else None for n, name in names])
            return jax.device_put(leaf, spec)

        q, indices = jax.tree.map(place, q.reorder(order)), jax.device_put(indices, jax.P("b"))
        run = jax.jit(lambda q, i: [take(q, i, 0, out_sharding=spec) for spec in PLACES])
        for out, spec in zip(run(q, indices), PLACES, strict=True):
            assert jax.typeof(out).sharding.spec == jax.P(*spec, *[None] * (3 - len(spec)))
            assert_same(np.asarray(out), want)


@pytest.mark.slow
def test_out_sharding_reaches_flattened_and_plain_arrays_and_adapters():
    q, key = quantized(TABLE, *CONFIGS["per row"]), jax.random.key(0)
    params = lora_init({"table": jnp.asarray(TABLE)}, Rule("table", W8A16, axis=-1), 2, key)
    mesh = explicit_mesh()
    for table, axis in ((q, None), (jnp.asarray(TABLE), 0), (params["table"], 0)):
        want = take(table, jnp.arange(8), axis)
        with jax.set_mesh(mesh):
            out = take(table, jnp.arange(8), axis, out_sharding=jax.NamedSharding(mesh, jax.P("a")))
            assert jax.typeof(out).sharding.spec[0] == "a"
            np.testing.assert_allclose(out, want, rtol=1e-6)


def test_an_out_sharding_that_is_none_is_named():
    q = quantized(TABLE, *CONFIGS["per row"])
    with pytest.raises(ValueError, match=r"a PartitionSpec or None; got 'a'\. Use jax\.P"):
        take(q, np.arange(4), 0, out_sharding="a")  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ValueError, match=r"out_sharding=P\('a',\) needs a mesh\. Pass a NamedShard"
    ):
        take(q, np.arange(4), 0, out_sharding=jax.P("a"))
    with jax.set_mesh(explicit_mesh()), pytest.raises(ValueError, match=r"axis: z of .*not found"):
        take(q, np.arange(4), 0, out_sharding=jax.P("z"))
