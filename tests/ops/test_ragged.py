import dataclasses
import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxquant import (
    FP8_E4M3,
    INT4,
    NVFP4,
    ArrayConfig,
    Inputs,
    explain,
    lift,
    quantize,
    ragged_dot,
    scan,
)
from jaxquant.kernels import cpu

from ..cases import Case
from .products import assert_close, normal, quantized, values, with_inputs
from .products import ragged_dot as slow_ragged_dot

M, G, K, N = 20, 4, 32, 10
EXPERTS = {
    "int8": Case(ArrayConfig(), 1),
    "int8-asym": Case(ArrayConfig(symmetric=False), 1),
    "int8-tensor": Case(ArrayConfig(per_tensor=True)),
    "int8-pairs": Case(ArrayConfig(group_size=(2, K)), (0, 1)),
    "int8-columns": Case(ArrayConfig(group_size=(K, 5)), (1, 2)),
    "int4-g16": Case(ArrayConfig(format=INT4, group_size=16), 1),
    "fp8": Case(ArrayConfig(format=FP8_E4M3), 1),
    "nvfp4": Case(ArrayConfig(format=NVFP4), 1),
}
ROWS = {
    "float": None,
    "int8": Case(ArrayConfig(), -1),
    "int8-tensor": Case(ArrayConfig(per_tensor=True)),
    "int8-asym": Case(ArrayConfig(symmetric=False), -1),
    "int8-pairs": Case(ArrayConfig(group_size=(2, K)), (0, 1)),
}
# With an empty group and rows that no group has.
SIZES = np.array([4, 3, 0, 9], np.int32)


def experts(case):
    is_nested = case.config.format is NVFP4
    return (quantize if is_nested else quantized)(normal(G, K, N, seed=1), *case)


@functools.cache
def rows_of_every_kind():
    x = normal(M, K)
    return {n: x if c is None else quantized(x, *c) for n, c in ROWS.items()}


def assert_ragged(got, x, q, sizes=SIZES, tolerance=2e-6):
    lhs, rhs = values(x), values(q)
    size = slow_ragged_dot(np.abs(lhs), np.abs(rhs), sizes)
    assert_close(got, slow_ragged_dot(lhs, rhs, sizes), size, tolerance)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", EXPERTS)
def test_every_mixture_of_formats_and_orders_matches_a_product_per_group(name):
    q = experts(EXPERTS[name])

    @jax.jit
    def products(rows, q, sizes):
        stored = [q, q.reorder((-1, -2)), q.reorder((-1, -3, -2))]
        return {
            n: [ragged_dot(a, w, sizes) for w in stored[: 2 + (n in ("float", "int8"))]]
            for n, a in rows.items()
        }

    rows = rows_of_every_kind()
    results = products(rows, q, SIZES)
    for kind, x in rows.items():
        for got in results[kind]:
            assert_ragged(got, x, q)


def test_the_order_of_the_left_operand_changes_nothing():
    # Square, so that a swap cannot be seen from the shape.
    x = quantized(normal(K, K), ArrayConfig(), axis=1)
    got = ragged_dot(x.reorder((-1, -2)), experts(EXPERTS["int8"]), SIZES)
    assert_ragged(got, x, experts(EXPERTS["int8"]))


def test_both_implementations_give_the_same_numbers_and_dtypes():
    x, q = quantized(normal(M, K), *ROWS["int8"]), experts(EXPERTS["int8"])
    for implementation in ("integer", "dequantize"):
        run = partial(ragged_dot, implementation=implementation)
        assert_ragged(run(x, q, SIZES), x, q)
        half = run(x, q, SIZES, preferred_element_type=jnp.bfloat16, precision="highest")
        assert half.dtype == jnp.bfloat16
        assert_ragged(half, x, q, tolerance=2.0**-8)
    with pytest.raises(ValueError, match="preferred_element_type must be a floating-point dtype"):
        ragged_dot(x, q, SIZES, preferred_element_type=jnp.int32)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_codes_are_multiplied_as_integers(platform):
    q = with_inputs(experts(EXPERTS["int8"]), Inputs(ArrayConfig()))
    lowered = jax.jit(ragged_dot).trace(normal(M, K), q, SIZES)
    text = lowered.lower(lowering_platforms=(platform,)).as_text()
    operands = r'(?:dot_general |ragged_dot").*: \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>'
    dots = re.findall(operands, text)
    assert set(dots) == {("i8", "i8")}


NATIVE = "jaxquant_ragged_dot"
needs_native = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=cpu.unavailable() or "is there"
)


@needs_native
@pytest.mark.parametrize("kind", ["float", "int8", "int8-tensor", "int8-pairs"])
@pytest.mark.parametrize("name", ["int8", "int8-asym", "int4-g16", "int4-asym", "nvfp4"])
def test_experts_stored_for_cpus_are_read_by_native_kernels(name, kind):
    asymmetric = Case(ArrayConfig(format=INT4, group_size=8, symmetric=False), 1)
    q = experts({**EXPERTS, "int4-asym": asymmetric}[name]).reorder((-1, -2))
    x = rows_of_every_kind()[kind]
    program = jax.jit(ragged_dot).lower(x, q, SIZES)
    assert NATIVE in program.as_text()
    assert_ragged(program.compile()(x, q, SIZES), x, q)
    half = ragged_dot(x, q, SIZES, preferred_element_type=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert_ragged(half, x, q, tolerance=2.0**-8)


@needs_native
@pytest.mark.parametrize(
    "sizes", [(0, 0, 0, 0), (20, 0, 0, 0), (1, 2, 3, 4), (9, 9, 9, 9)], ids=str
)
def test_rows_without_an_expert_are_zeros(sizes):
    """Rows that more experts want than there are belong to the first ones."""
    q = experts(EXPERTS["int4-g16"]).reorder((-1, -2))
    x, got = normal(M, K), ragged_dot(normal(M, K), q, np.array(sizes, np.int32))
    kept = np.minimum(np.cumsum(sizes), M)
    assert_ragged(got, x, q, np.diff(kept, prepend=0))
    np.testing.assert_array_equal(got[kept[-1] :], 0)


@needs_native
def test_experts_without_rows_are_not_read():
    q = quantize(normal(G, K, N, seed=1), ArrayConfig(format=INT4, group_size=16), 1)
    scale = jnp.asarray(q.scale).at[2].set(jnp.nan)
    spoiled = dataclasses.replace(q, scale=scale).reorder((-1, -2))
    assert_ragged(ragged_dot(normal(M, K), spoiled, SIZES), normal(M, K), q)


@needs_native
def test_programs_that_cannot_hold_kernels_are_left_to_xla():
    q, x = experts(EXPERTS["int4-g16"]).reorder((-1, -2)), jnp.asarray(normal(M, K))
    exported = export.export(jax.jit(ragged_dot))(x, q, SIZES)
    assert NATIVE not in exported.mlir_module()
    assert_ragged(exported.call(x, q, SIZES), x, q)
    mesh = jax.make_mesh((2,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("n")))
    program = jax.jit(ragged_dot).lower(split, q, SIZES)
    assert NATIVE not in program.as_text()
    assert_ragged(program.compile()(split, q, SIZES), x, q)
    for weights, message in (
        (experts(EXPERTS["int4-g16"]), "not stored with the contracted axis last"),
        (experts(EXPERTS["fp8"]).reorder((-1, -2)), "fp8_e4m3 codes are not integers"),
    ):
        with pytest.raises(ValueError, match=message):
            ragged_dot(x, weights, SIZES, implementation="native")


@needs_native
def test_vmap_over_native_experts_is_a_loop():
    q, x = experts(EXPERTS["int4-g16"]).reorder((-1, -2)), jnp.asarray(normal(2, M, K))
    sizes = jnp.array([SIZES, SIZES[::-1]])
    both = jax.tree.map(lambda a: jnp.stack([a, a]), q)  # JAX does not map rows alone.
    got = jax.jit(jax.vmap(ragged_dot))(x, both, sizes)
    for i in range(2):
        assert_ragged(got[i], x[i], q, np.asarray(sizes[i]))


def test_inputs_treat_the_rows_first():
    multiplier = jnp.asarray(np.linspace(0.5, 2, K), jnp.float32)
    x = jnp.asarray(normal(M, K))
    q = experts(EXPERTS["int8"])
    treated = with_inputs(q, Inputs(ArrayConfig(), multiplier=multiplier)).reorder((-1, -2))
    rows = quantize(x * multiplier.reshape(1, -1), *ROWS["int8"])

    assert_ragged(jax.jit(ragged_dot)(x, treated, SIZES), rows, q)


def test_rows_below_the_last_group_are_zeros_whatever_they_hold():
    x, w = normal(M, K), normal(G, K, N, seed=1)
    x[17, 3], w[3, 2, 5] = np.inf, np.nan
    q, rows = quantize(w, *EXPERTS["int8"]), quantize(x, *ROWS["int8"])

    got = np.asarray(ragged_dot(rows, q, SIZES, implementation="integer"))

    np.testing.assert_array_equal(got[16:], 0)
    assert np.isnan(got[7:16, 5]).all()
    assert np.isfinite(got[:7]).all()


def test_a_bad_row_spoils_itself_alone():
    x = normal(M, K)
    x[2, 3], x[6, 0] = np.nan, -np.inf
    q = with_inputs(experts(EXPERTS["int8"]), Inputs(ArrayConfig()))
    is_bad = np.isnan(ragged_dot(x, q, SIZES)).all(1)
    np.testing.assert_array_equal(np.flatnonzero(is_bad), [2, 6])


def test_gradients_are_those_of_the_float_product():
    x, q = jnp.asarray(normal(M, K)), experts(EXPERTS["int4-g16"])
    cotangent = normal(M, N, seed=2)

    def loss(product, x):
        return jnp.sum(product(x) * cotangent)

    for inputs in (None, Inputs(ArrayConfig())):
        w = with_inputs(q, inputs)
        got = jax.jit(jax.grad(partial(loss, lambda x, w=w: ragged_dot(x, w, SIZES))))(x)
        want = np.zeros((M, K))
        start = 0
        for matrix, size in zip(values(q), SIZES, strict=True):
            rows = slice(start, start + size)
            want[rows] = cotangent[rows].astype(np.float64) @ matrix.T
            start += size
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_groups_with_an_offset_are_not_multiplied_as_integers():
    x, q = quantized(normal(M, K), *ROWS["int8"]), experts(EXPERTS["int8"])
    offset = jnp.array([0], jnp.int32)

    with pytest.raises(ValueError, match="group_offset moves the groups"):
        ragged_dot(x, q, SIZES, group_offset=offset, implementation="integer")


UNSUPPORTED = {
    "an operand of float32 does not have codes": ("float", "int8"),
    "fp8_e4m3 codes are not integers within int8": ("int8", "fp8"),
    "ragged sums do not support zero points": ("int8-asym", "int8"),
    r"scales \(4, 2, 10\) change along the contracted axis": ("int8", "int4-g16"),
    r"rows of the left operand share scales \(10, 1\)": ("int8-pairs", "int8"),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_unsupported_integer_raises_with_the_reason(message):
    kind, name = UNSUPPORTED[message]
    x = normal(M, K)
    x = x if ROWS[kind] is None else quantize(x, *ROWS[kind])
    with pytest.raises(ValueError, match=message):
        ragged_dot(x, experts(EXPERTS[name]), SIZES, implementation="integer")


def test_long_sums_are_not_computed_as_integers():
    # 127^2 * 140001 is more than 2^31.
    x = quantized(np.ones((1, 140001), np.float32), ArrayConfig(), axis=1)
    q = quantized(np.ones((1, 140001, 1), np.float32), ArrayConfig(), axis=1)
    with pytest.raises(ValueError, match="sums of 140001 codes may leave int32"):
        ragged_dot(x, q, np.array([1]), implementation="integer")
    for weights in (q, q.reorder((-1, -2))):
        np.testing.assert_allclose(ragged_dot(x, weights, np.array([1])), [[140001]], rtol=1e-5)


def test_plain_arrays_go_to_lax_unchanged():
    x, w = jnp.asarray(normal(M, K)), jnp.asarray(normal(G, K, N))
    want = jax.lax.ragged_dot(x, w, jnp.asarray(SIZES))
    np.testing.assert_array_equal(ragged_dot(x, w, jnp.asarray(SIZES)), want)


STACKS = {name: EXPERTS[name] for name in ("int8", "int8-asym", "int4-g16", "int8-tensor", "nvfp4")}


def stack_of(case, layers=3):
    """Experts of several layers, and those of each."""
    each = [quantize(normal(G, K, N, seed=seed), *case) for seed in range(layers)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), each


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", STACKS)
def test_a_layer_of_a_stack_is_the_same_as_its_slice(name):
    stack, each = stack_of(STACKS[name])
    x = normal(M, K)
    for order in (None, (-1, -2)):
        for inputs in (None, Inputs(ArrayConfig())):
            left = dataclasses.replace(stack, inputs=inputs).reorder(order)
            one = dataclasses.replace(each[1], inputs=inputs).reorder(order)
            wanted = ragged_dot(x, one, SIZES)
            np.testing.assert_array_equal(ragged_dot(x, left, SIZES, layer=1), wanted)
            found = jax.jit(ragged_dot)(x, left, SIZES, layer=jnp.uint8(1))
            np.testing.assert_array_equal(found, jax.jit(ragged_dot)(x, one, SIZES))
    # As for slices of jax.lax, an index is brought into bounds.
    for index, inside in ((7, 2), (-9, 0), (-1, 2)):
        found = ragged_dot(x, stack, SIZES, layer=index)
        np.testing.assert_array_equal(found, ragged_dot(x, each[inside], SIZES))


def test_stacks_of_floats_and_of_other_orders():
    stack, each = stack_of(EXPERTS["int8"])
    x = normal(M, K)
    floats = jnp.stack([q.dequantize() for q in each])
    wanted = ragged_dot(x, floats[2], SIZES)
    np.testing.assert_array_equal(ragged_dot(x, floats, SIZES, layer=2), wanted)
    # One scale per expert, which all layers share.
    shared = dataclasses.replace(stack, scale=stack.scale[:1])
    one = dataclasses.replace(each[2], scale=stack.scale[0])
    found = ragged_dot(x, shared, SIZES, layer=2)
    np.testing.assert_array_equal(found, ragged_dot(x, one, SIZES))
    turned = stack.reorder((-3, -4, -2, -1))
    found = ragged_dot(x, turned, SIZES, layer=2)
    np.testing.assert_array_equal(found, ragged_dot(x, each[2], SIZES))


def by_index(x, stack):
    def layer(total, index):
        return total / 2 + ragged_dot(x, stack, SIZES, layer=index), None

    return jax.lax.scan(layer, jnp.zeros((M, N)), jnp.arange(3))[0]


def by_slice(loop, product, x, stack):
    def layer(total, q):
        return total / 2 + product(x, q, SIZES), None

    return loop(layer, jnp.zeros((M, N)), stack)[0]


LOOPS = {
    "by index": by_index,
    "by slice": partial(by_slice, scan, ragged_dot),
    "backwards": partial(by_slice, partial(scan, reverse=True), ragged_dot),
    "lifted": lift(partial(by_slice, jax.lax.scan, jax.lax.ragged_dot)),
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.skipif(cpu.unavailable() is not None, reason=cpu.unavailable() or "is there")
def test_loops_over_layers_read_the_stack_where_it_is(name):
    case = Case(ArrayConfig(format=INT4, group_size=16), 1)
    stack, each = stack_of(case)
    stack, x, sums = stack.reorder((-1, -2)), jnp.asarray(normal(M, K)), jax.jit(LOOPS[name])
    each = each[::-1] if name == "backwards" else each
    wanted = sum(
        ragged_dot(x, q.reorder((-1, -2)), SIZES) / 2 ** (2 - i) for i, q in enumerate(each)
    )
    np.testing.assert_allclose(sums(x, stack), wanted, rtol=1e-5, atol=1e-5)
    text = sums.lower(x, stack).compile().as_text() or ""
    assert "jaxquant_ragged" in text
    assert "jaxquant_slice" not in text
    assert not re.search(r"s4\[[\d,]*\]\S* (dynamic-slice|fusion)", text)


def test_a_layer_of_a_stack_differentiates_and_counts_one_layer():
    stack, each = stack_of(EXPERTS["int4-g16"])
    x = jnp.asarray(normal(M, K))
    slopes = [
        jax.grad(lambda x, q=q, given=given: (ragged_dot(x, q, SIZES, **given) ** 2).sum())(x)
        for q, given in ((stack, {"layer": 1}), (each[1], {}))
    ]
    np.testing.assert_array_equal(*slopes)
    whole, one = (
        explain(partial(ragged_dot, **given), x, q, SIZES).rows[0]
        for q, given in ((stack, {"layer": 1}), (each[1], {}))
    )
    assert (whole.bytes, whole.shapes) == (one.bytes, one.shapes)


@pytest.mark.parametrize(
    "layer, shape, text",
    [
        (None, (3, G, K, N), r"needs experts \(G, K, N\); got shape \(3, 4, 32, 10\)"),
        (
            0,
            (G, K, N),
            r"needs experts in a stack \(L, G, K, N\), because `layer` .* \(4, 32, 10\)",
        ),
    ],
)
def test_shapes_that_do_not_fit_raise(layer, shape, text):
    for w in (normal(*shape), quantize(normal(*shape), ArrayConfig(), axis=-2)):
        with pytest.raises(ValueError, match=text):
            ragged_dot(normal(M, K), w, SIZES, layer=layer)
