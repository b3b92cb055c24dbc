"""Loops over stacked layers: as `jax.lax.scan`'s, and without a slice of narrow elements."""

import dataclasses
import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant import INT2, INT4, NF4, NVFP4, ArrayConfig, Inputs, QTensor, explain, matmul, scan
from jaxquant.core import LowRank
from jaxquant.jaxprs.copying_scan import _compiled
from jaxquant.kernels import cpu
from jaxquant.ops.stacks import stack_of

from .products import assert_product, normal, quantized

pytestmark = pytest.mark.usefixtures("quick_compilation")

needs_native = pytest.mark.skipif(cpu.unavailable() is not None, reason="no native kernels")
LAYERS, K, N = 3, 8, 6
CONFIGS = {
    "int4": ArrayConfig(format=INT4, symmetric=False, group_size=4),
    "int4-nested": ArrayConfig(format=INT4, group_size=4, scale_dtype="float8_e4m3fn"),
    "int2": ArrayConfig(format=INT2, symmetric=False, group_size=4),
    "nf4": ArrayConfig(format=NF4),
    "nvfp4": ArrayConfig(format=NVFP4),
    "int8": ArrayConfig(),
}


def stack(config, shape=(K, N)):
    """Layers that differ, stored column by column."""
    layers = [
        quantized(normal(*shape, seed=i), config, axis=-2).reorder((-1, -2)) for i in range(LAYERS)
    ]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *layers)


def shape_of(config):
    return (16, N) if config.format is NVFP4 else (K, N)


def calls(run, *args):
    """How often a lowered program calls the native kernel for slices."""
    return jax.jit(run).lower(*args).as_text().count("custom_call @jaxquant_slice")


def slices(run, q, **options):
    """All that the body gets, as it gets it."""
    return run(lambda count, layer: (count + 1, (count, layer)), jnp.int32(0), q, **options)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


OPTIONS = {
    "int4": {"reverse": True},
    "int2": {"unroll": 2, "length": LAYERS},
    "nf4": {"unroll": True, "reverse": True},
}


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_body_gets_each_layer_as_it_was_stacked(name):
    options = OPTIONS.get(name, {})
    q = stack(CONFIGS[name], shape_of(CONFIGS[name]))
    count, (steps, layers) = jax.jit(partial(slices, scan, **options))(q)
    assert count == LAYERS
    np.testing.assert_array_equal(steps, np.arange(LAYERS)[:: -1 if "reverse" in options else 1])
    assert isinstance(layers, QTensor)
    # What the body got, stacked again, is what was stacked: nothing of XLA's slices is in that.
    assert_same(layers, q)


@needs_native
def test_steps_are_unrolled():
    for unroll, count in ((1, 1), (True, 0)):
        run = jax.jit(partial(slices, scan, unroll=unroll))
        assert run.lower(SQUARE).as_text().count("stablehlo.while") == count


@needs_native
def test_the_native_kernel_copies_slices_of_sub_byte_arrays_that_fill_whole_bytes():
    codes_and_zeros = partial(slices, scan), stack(CONFIGS["int4"])
    assert calls(*codes_and_zeros) == 2
    assert calls(partial(slices, scan), stack(CONFIGS["nvfp4"], (16, N))) == 2  # And scales.
    assert calls(partial(slices, scan), stack(CONFIGS["int8"])) == 0
    assert calls(partial(slices, lax.scan), stack(CONFIGS["int4"])) == 0
    odd = jnp.arange(LAYERS * 15, dtype=jnp.int32).reshape(LAYERS, 3, 5) % 16 - 8
    whole, other = odd[:, :2].astype(jnp.int4), odd.astype(jnp.int4)
    assert calls(partial(slices, scan), {"whole": whole, "odd": other}) == 1
    _, (_, got) = jax.jit(partial(slices, scan))({"whole": whole, "odd": other})
    assert_same(got, {"whole": whole, "odd": other})
    assert_same(*(jax.jit(partial(slices, run))(odd.astype(jnp.int2)) for run in (scan, lax.scan)))


@needs_native
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "bfloat16"])
def test_floats_that_xla_computes_in_wider_ones_are_not_converted_before_the_loop(name):
    x = jnp.asarray(np.resize([1, 2, np.inf, -0.5, 4, np.nan, 0.25], (LAYERS, 5, 4)), name)
    # XLA on CPU converts the whole stack if the loop reads its slices.
    wide = re.compile(rf"f(16|32)\[{LAYERS},5,4\]\S* convert\(")

    def run(loop, x):
        def step(total, row):
            wide = row.astype(jnp.float32)
            return total + wide, wide

        return loop(step, jnp.zeros((5, 4)), x)

    assert calls(partial(run, scan), x) == 1
    ours, plain = (jax.jit(partial(run, loop)).lower(x).compile() for loop in (scan, lax.scan))
    assert not wide.search(ours.as_text() or "")
    if name != "bfloat16":  # Which newer versions of XLA slice as it is.
        assert wide.search(plain.as_text() or "")
    assert_same(*(jax.jit(partial(run, loop))(x) for loop in (scan, lax.scan)))


def layer(x, q):
    return jnp.tanh(matmul(x, q)), jnp.sum(x)


SQUARE = stack(CONFIGS["int4"], (K, K))
X = jnp.asarray(normal(4, K))


def model(run, x, q, f=layer, **options):
    # `bias` is closed over, and differentiated where x is.
    bias = x[0] * 0.5
    return run(lambda x, q: f(x + bias[None], q), x, q, **options)


def gradients(run, x, q, **options):
    def loss(x, scale):
        last, sums = model(run, x, dataclasses.replace(q, scale=scale), **options)
        return jnp.sum(last) + jnp.sum(sums)

    return jax.value_and_grad(loss, (0, 1))(x, q.scale)


TRANSFORMED = {
    "checkpoint": partial(model, f=jax.checkpoint(layer)),
    "gradient": gradients,
    "gradient of checkpoint": partial(gradients, f=jax.checkpoint(layer)),
    "gradient of checkpoint around": lambda run, x, q: jax.grad(
        jax.checkpoint(lambda x: jnp.sum(model(run, x, q)[0]))
    )(x),
    "vmap of inputs": lambda run, x, q: jax.vmap(lambda row: model(run, row[None], q))(x),
    "vmap of weights": lambda run, x, q: jax.vmap(partial(model, run), (None, 1))(x, twice(q, 1)),
    "vmap of all": lambda run, x, q: jax.vmap(partial(model, run))(
        jnp.stack([x, 2 * x]), twice(q, 0)
    ),
    "vmap with sums": lambda run, x, q: jax.vmap(
        lambda row: run(lambda x, q: (x + lax.psum(layer(x, q)[0], "i"), None), row[None], q),
        axis_name="i",
    )(x),
    "scan of scans": lambda run, x, q: run(lambda x, q: model(run, x, q), x, twice(q, 0)),
}


def twice(q, axis):
    return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf], axis), q)


@functools.cache
def transformed():
    """Results of each with both kinds of scan, in one program."""
    both = lambda run, x, q: [run(s, x, q) for s in (scan, lax.scan)]  # noqa: E731
    return jax.jit(lambda x, q: {n: both(run, x, q) for n, run in TRANSFORMED.items()})(X, SQUARE)


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations_equal_those_of_the_plain_scan(name):
    run = TRANSFORMED[name]
    assert_same(*transformed()[name])
    if cpu.unavailable() is None:
        # A gradient is that of the plain scan, which keeps no second stack of codes.
        assert (calls(partial(run, scan), X, SQUARE) > 0) == ("gradient" not in name)


def test_products_of_the_layers_match_their_dequantized_values():
    q = stack(CONFIGS["nf4"])
    x = jnp.asarray(normal(5, K))
    _, got = jax.jit(lambda x, q: scan(lambda x, q: (x, matmul(x, q)), x, q))(x, q)
    for i in range(LAYERS):
        assert_product(got[i], "mk,kn->mn", x, jax.tree.map(lambda leaf, i=i: leaf[i], q))


def test_layers_may_have_adapters():
    q = stack(CONFIGS["int4"])
    a, b = jnp.ones((LAYERS, K, 2)), jnp.ones((LAYERS, 2, N))
    layers = LowRank(q, a, b, alpha=2.0, config=CONFIGS["int4"])
    x = jnp.asarray(normal(5, K))
    both = jax.jit(lambda *qs: [scan(lambda _, q: (None, matmul(x, q)), None, q)[1] for q in qs])
    got, base = both(layers, q)
    added = np.broadcast_to(x @ (a[0] @ b[0]), base.shape)
    np.testing.assert_allclose(got - base, added, rtol=1e-4, atol=1e-4)


def test_the_function_is_traced_once_and_compiled_once():
    traces = []

    def f(x, q):
        traces.append(x)
        return x + 1.5, q.codes

    run = jax.jit(lambda x, q: scan(f, x, q))
    for value in (1.0, 2.0, 3.0):
        scan(f, jnp.float32(value), SQUARE)
        run(jnp.float32(value), SQUARE)
    # Within `jit` its context is another one.
    assert len(traces) <= 2
    before = _compiled.cache_info().misses
    scan(f, jnp.float32(4), SQUARE)
    assert _compiled.cache_info().misses == before
    # A carry of weak type is traced again, and becomes what the function returns.
    assert scan(f, 1, SQUARE)[0].dtype == jnp.float32


WRONG = {
    "another carry": (lambda c, q: ((c, c), q.codes), {}),
    "no pair": (lambda c, q: c, {}),
    "length": (layer, {"length": 5}),
    "no function": (None, {}),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_those_of_the_plain_scan(name):
    f, options = WRONG[name]
    raised = []
    for run in (scan, lax.scan):
        with pytest.raises((TypeError, ValueError)) as error:
            run(f, X, SQUARE, **options)
        raised.append((error.type, str(error.value)))
    assert raised[0] == raised[1]
    with pytest.raises(ValueError, match="different leading axis sizes"):
        scan(layer, X, (SQUARE, X[:2]))


@pytest.mark.parametrize(
    "body", [lambda c, q: c, lambda c, q: (c, None, c), lambda c, q: jnp.stack([c, c])]
)
def test_a_traced_body_must_return_a_pair(body):
    with pytest.raises(TypeError, match="scan body output must be a pair"):
        jax.jit(partial(scan, body))(X, SQUARE)


def test_other_and_empty_arrays_use_the_plain_scan():
    key = jax.random.split(jax.random.key(0), 3)
    xs = {"floats": X[:3], "keys": key, "flags": X[:3, 0] > 0, "none": None}
    for run in (scan, lax.scan):
        total, _ = run(lambda c, x: (c + jnp.sum(x["floats"]), None), jnp.float32(0), xs)
        np.testing.assert_allclose(total, np.sum(np.asarray(X[:3])), rtol=1e-5)
    assert scan(lambda c, _: (c + 1, None), 0, length=4)[0] == 4
    empty = jnp.zeros((0, 4), jnp.int4), jnp.zeros((0, 4))
    assert_same(*(slices(run, empty) for run in (scan, lax.scan)))
    nothing = jnp.zeros((3, 0), jnp.int4)
    assert_same(*(slices(run, nothing) for run in (scan, lax.scan)))


def test_effects_happen_in_order(capfd):
    def f(count, codes):
        jax.debug.print("step {}", count, ordered=True)
        return count + 1, codes

    jax.block_until_ready(jax.jit(lambda q: scan(f, 0, q))(SQUARE))
    jax.effects_barrier()
    assert capfd.readouterr().out.split() == ["step", "0", "step", "1", "step", "2"]


def test_a_function_may_write_to_references():
    @jax.jit
    def run(codes):
        seen = jax.new_ref(jnp.zeros(codes.shape[1:], jnp.int4))

        def f(count, codes):
            seen[...] = codes
            return count + 1, None

        return scan(f, 0, codes)[0], seen[...]

    assert_same(run(SQUARE.codes), (jnp.int32(LAYERS), SQUARE.codes[-1]))


def place(q, mesh, partition):
    """`partition` is that of codes; what has one element along an axis has it in full."""

    def spec(leaf):
        return P(*[a if n > 1 else None for a, n in zip(partition, leaf.shape, strict=True)])

    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf))), q)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("partition", [(None, "a", None), (None, None, "a"), (None, None, None)])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_layers_are_sliced_where_they_lie(partition, kind):
    mesh = jax.make_mesh((2,), ("a",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        q = place(stack(CONFIGS["int4"]), mesh, partition)
        got, want = (jax.jit(partial(slices, run))(q) for run in (scan, lax.scan))
    assert_same(got, want)
    assert got[1][1].codes.sharding.is_equivalent_to(want[1][1].codes.sharding, 3)
    assert "jaxquant_slice" not in jax.jit(partial(slices, scan)).lower(q).as_text()


def test_each_device_slices_its_part():
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))
    q = stack(CONFIGS["nf4"])

    def parts(run):
        return jax.shard_map(
            lambda x, q: run(lambda x, q: (x, matmul(x, q)), x, q)[1],
            mesh=mesh,
            in_specs=(P(), P(None, "a")),
            out_specs=P(None, None, "a"),
        )

    assert_same(*(jax.jit(parts(run))(X, q) for run in (scan, lax.scan)))
    if cpu.unavailable() is None:
        assert calls(parts(scan), X, q) == 1


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "tpu")])
def test_an_exported_loop_has_no_native_kernel(platforms):
    q = stack(CONFIGS["int4"])
    exported = jax.export.export(jax.jit(partial(slices, scan)), platforms=platforms)(q)
    assert "jaxquant_slice" not in exported.mlir_module()
    read = jax.export.deserialize(exported.serialize())
    assert_same(read.call(q), slices(lax.scan, q))


def test_programs_for_other_platforms_have_no_native_kernel():
    run = jax.jit(partial(model, scan))
    text = run.trace(X, SQUARE).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.while" in text
    assert "jaxquant_slice" not in text


def test_without_native_kernels_it_is_the_plain_scan(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "none here")
    assert "copying" not in str(jax.make_jaxpr(partial(slices, scan))(SQUARE))


def test_donated_stacks_and_disabled_jit_change_nothing():
    want = slices(lax.scan, SQUARE)
    copy = jax.tree.map(jnp.copy, SQUARE)
    assert_same(jax.jit(partial(slices, scan), donate_argnums=0)(copy), want)
    with jax.disable_jit():
        assert_same(slices(scan, SQUARE), want)


def test_it_can_be_transposed():
    codes = jnp.asarray([[2, 1], [3, 1], [-5, 1]]).astype(jnp.int4)

    def linear(run, x):
        return run(lambda x, code: (x * code[0].astype(x.dtype), x), x, codes)[0]

    for run in (scan, lax.scan):
        (got,) = jax.linear_transpose(partial(linear, run), X)(X)
        np.testing.assert_allclose(got, np.asarray(X) * -30, rtol=1e-6)


@needs_native  # Without kernels, explain warns that float32 is faster.
def test_explain_has_one_row_per_product_and_no_warning_where_bytes_are_copied():
    q = stack(ArrayConfig(format=INT4, group_size=128), (256, 256))
    x = jnp.ones((2, 256))

    def product(run, x, q):
        return run(lambda x, q: (matmul(x, q), None), x, q)[0]

    (plain,) = explain(partial(product, lax.scan), x, q, platform="cpu")
    (ours,) = explain(partial(product, scan), x, q, platform="cpu")
    assert (ours.times, ours.bytes, ours.line) == (LAYERS, plain.bytes, plain.line)
    assert ours.warning is None
    assert ours.implementation == plain.implementation


def test_stacks_are_known_of_slices_as_they_are():
    q = stack(CONFIGS["int4"])
    known = []

    def step(x, slices):
        own, floats = slices

        def inner(x, row):
            mixed = dataclasses.replace(row, scale=own.scale)
            known.extend(map(stack_of, (row, own, mixed)))
            return x, None

        with_inputs = dataclasses.replace(own, inputs=Inputs(ArrayConfig()))
        known.extend(map(stack_of, (own, with_inputs, floats)))
        known.append(stack_of(dataclasses.replace(own, codes=own.codes + 1)))
        known.append(stack_of(own.reorder(None)))
        scan(inner, x, own)
        return x, None

    jax.jit(lambda x, q: scan(step, x, (q, jnp.ones(LAYERS))))(jnp.float32(1), q)
    shapes = [found and found[0].codes.shape for found in known]
    whole = q.codes.shape
    assert shapes == [whole, whole, None, None, None, whole[1:], whole, None]
    assert stack_of(q) is None
    assert all(found is None or found[0].inputs is None for found in known)
