"""Lifted functions under, over and beside JAX's transformations."""

import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from jaxquant.jaxprs import walk

from . import cases


def model(params, x):
    """Two layers, a norm and a tied table."""
    h = jnp.tanh(x @ params["first"]) * params["gain"]
    return h @ params["first"].T @ params["table"].T


def by_hand(params, x):
    """`model` written with jaxquant's operations."""
    h = jnp.tanh(jq.matmul(x, params["first"])) * params["gain"]
    return jq.einsum("bd,vd->bv", jq.einsum("bn,kn->bk", h, params["first"]), params["table"])


def floats():
    random = np.random.default_rng(0)
    shapes = {"first": (64, 96), "gain": (1, 96), "table": (40, 64)}
    return {n: jnp.asarray(random.normal(size=s).astype(np.float32)) for n, s in shapes.items()}


RULES = (
    jq.Rule("first", jq.ArrayConfig(format=jq.INT4, group_size=32), axis=0),
    jq.Rule("table", jq.W8A16, axis=1),
)


@pytest.fixture(scope="module")
def params():
    return jq.tree.quantize(floats(), RULES)


@pytest.fixture(scope="module")
def x():
    return cases.rows()


def test_it_computes_what_the_operations_compute(params, x):
    found = jax.jit(jq.lift(model))(params, x)
    np.testing.assert_allclose(found, jax.jit(by_hand)(params, x), rtol=1e-5, atol=1e-4)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("labels", ["kn,bk->nb", "kn,bk->bn", "hkn,hbk->hnb", "hkn,bhk->bhn"])
def test_a_parameter_on_the_left_is_multiplied_on_the_right(labels):
    shapes = {"k": 64, "n": 96, "b": 3, "h": 2}
    (left, right), random = labels.split("->")[0].split(","), np.random.default_rng(0)
    w, x = (
        jnp.asarray(random.normal(size=[shapes[c] for c in part]).astype(np.float32))
        for part in (left, right)
    )
    q = jq.quantize(w, jq.ArrayConfig(), axis=left.index("k"))
    found = jax.jit(jq.lift(functools.partial(jnp.einsum, labels)))(q, x)
    expected = jnp.einsum(labels, q.dequantize(), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_parameters_that_are_quantized_alike_keep_their_shapes():
    params = {"first": jnp.ones((8, 4)), "second": jnp.ones((4, 6))}
    quantized = jax.eval_shape(lambda p: jq.tree.quantize(p, jq.W8A16), params)
    lifted = jq.lift(lambda p: jnp.ones((2, 8)) @ p["first"] @ p["second"], strict=True)
    assert jax.eval_shape(lifted, quantized).shape == (2, 6)


def test_a_function_without_quantized_arguments_is_itself(x):
    found = jax.jit(jq.lift(model))(floats(), x)
    np.testing.assert_array_equal(found, jax.jit(model)(floats(), x))


def test_lifting_twice_is_lifting_once(params, x):
    twice = jax.jit(jq.lift(jq.lift(model)))(params, x)
    np.testing.assert_array_equal(twice, jax.jit(jq.lift(model))(params, x))


def test_eager_calls_compute_the_same(params, x):
    np.testing.assert_allclose(
        jq.lift(model)(params, x), jax.jit(jq.lift(model))(params, x), rtol=1e-5, atol=1e-4
    )


def test_gradients_are_those_of_the_operations(params, x):
    def gradient(fn):
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(fn(params, x)))))(x)

    np.testing.assert_allclose(gradient(jq.lift(model)), gradient(by_hand), rtol=1e-4, atol=1e-3)


def test_prepared_parameters_get_the_gradients_of_the_operations(x):
    prepared = jq.training.prepare(floats(), RULES)

    def gradient(fn):
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(fn(p, x)))))(prepared)

    found, expected = gradient(jq.lift(model)), gradient(by_hand)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    assert float(jnp.abs(found["first"].weight).max()) > 0


@pytest.mark.slow
def test_adapters_get_the_gradients_of_the_operations(x):
    adapted = jq.training.lora_init(floats(), RULES, 4, key=jax.random.key(0))
    # One of both is zero at first, and so is the gradient of the other one.
    adapted |= {
        name: dataclasses.replace(
            adapted[name],
            a=cases.normal(*adapted[name].a.shape),
            b=cases.normal(*adapted[name].b.shape),
        )
        for name in ("first", "table")
    }

    def gradient(fn):
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(fn(p, x))), allow_int=True))(adapted)

    found, expected = gradient(jq.lift(model)), gradient(by_hand)
    for name in ("first", "table"):
        for part in ("a", "b"):
            a, b = (getattr(tree[name], part) for tree in (found, expected))
            assert float(jnp.abs(b).max()) > 0.1
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_vmap_of_a_lifted_function_is_a_loop(params):
    xs = jnp.stack([cases.rows(), 2 * cases.rows()])
    found = jax.jit(jax.vmap(jq.lift(model), (None, 0)))(params, xs)
    one = jax.jit(jq.lift(model))
    np.testing.assert_allclose(found, [one(params, x) for x in xs], rtol=1e-4, atol=1e-3)


def test_vmap_over_stacked_parameters_is_a_loop(x):
    quantize = functools.partial(jq.quantize, config=jq.ArrayConfig(), axis=0)
    stacked = jax.vmap(quantize)(jnp.stack([floats()["first"], -floats()["first"]]))
    found = jax.jit(jax.vmap(jq.lift(jnp.matmul), (None, 0)))(x, stacked)
    one = jax.jit(jq.matmul)
    expected = [one(x, jax.tree.map(lambda v, i=i: v[i], stacked)) for i in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_a_lifted_body_of_scan_is_a_loop(params, x):
    layers = jax.tree.map(lambda v: jnp.stack([v, v]), params["first"])
    body = jq.lift(lambda x, w: (jnp.tanh(x @ w @ w.T), None))
    found, _ = lax.scan(body, x, layers)
    expected, step = x, jax.jit(body)
    for _ in range(2):
        expected, _ = step(expected, params["first"])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_an_empty_scan_runs_nothing(params, x):
    def empty(w, x):
        return lax.scan(lambda x, layer: (x @ layer @ layer.T, None), x, w[None][:0])[0]

    np.testing.assert_array_equal(jax.jit(jq.lift(empty))(params["first"], x), x)


def test_programs_can_be_exported(params, x):
    exported = jax.export.export(jax.jit(jq.lift(model)))(params, x)
    found = jax.export.deserialize(exported.serialize()).call(params, x)
    np.testing.assert_allclose(found, jax.jit(jq.lift(model))(params, x), rtol=1e-4, atol=1e-3)


def test_donated_arguments_and_one_trace_per_structure(params, x):
    traces = []

    def counted(params, x):
        traces.append(x)
        return x @ params["first"] @ params["first"].T

    served = jax.jit(jq.lift(counted), donate_argnums=1)
    for _ in range(3):
        served(params, jnp.copy(x))
    assert len(traces) == 1
    served(floats(), jnp.copy(x))
    assert len(traces) == 2


def test_threads_do_not_disturb_each_other(params, x):
    expected = {True: jax.jit(jq.lift(model))(params, x), False: jax.jit(model)(floats(), x)}
    wrong = []

    def work(is_quantized):
        for _ in range(3):
            fn = jax.jit(jq.lift(lambda p, x: model(p, x)))
            found = fn(params if is_quantized else floats(), x)
            if not np.array_equal(found, expected[is_quantized]):
                wrong.append(is_quantized)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_arguments_that_are_not_arrays_reach_the_function_as_they_are(params, x):
    def apply(params, x, *, train, name=None, scale=2.0, dims=(1,)):
        assert train is False
        assert name == "a"
        assert isinstance(scale, float)
        return {"out": scale * jnp.sum(x @ params["first"], axis=dims), "name": name, "n": 3}

    out = jq.lift(apply)(params, x, train=False, name="a")
    assert out["name"] == "a"
    assert int(out["n"]) == 3
    expected = 2 * np.sum(jq.matmul(x, params["first"]), axis=1)
    np.testing.assert_allclose(out["out"], expected, rtol=1e-4)


def test_arguments_that_are_returned_stay_quantized(params, x):
    def step(params, x):
        return {**params, "gain": params["gain"] + 1}, x @ params["first"]

    found, _ = jax.jit(jq.lift(step))(params, x)
    assert jq.tree.is_quantized(found["first"])
    np.testing.assert_array_equal(found["first"].codes, params["first"].codes)
    np.testing.assert_array_equal(found["gain"], params["gain"] + 1)


def test_a_table_that_no_operation_needs_costs_nothing(params, x):
    def apply(params, x):
        jnp.tanh(params["table"])  # Its result is not used.
        return x @ params["first"]

    assert not jq.explain(jq.lift(apply), params, x).dequantized


def test_debug_callbacks_keep_their_order(params, x):
    seen = []

    def apply(params, x):
        jax.debug.callback(lambda _: seen.append("before"), x, ordered=True)
        y = x @ params["first"]
        jax.debug.callback(lambda _: seen.append("after"), y, ordered=True)
        return y

    jax.block_until_ready(jax.jit(jq.lift(apply))(params, x))
    jax.effects_barrier()
    assert seen == ["before", "after"]


def test_activations_are_calibrated_through_it(x):
    scheme = jq.W8A8
    observed = jq.training.calibrate(
        jq.lift(model), floats(), [x, 2 * x], [jq.Rule("first", scheme, axis=0)],
        observer=jq.training.RunningAbsMax.init(),
    )  # fmt: skip
    assert float(observed["first"].inputs.scale) >= float(2 * jnp.abs(x).max() / 127)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("spec", [jax.P("d", None), jax.P(None, "d"), jax.P(None, None)])
@pytest.mark.parametrize("quantized", ["int8", "int4 g32", "int4 g16 asymmetric", "mxfp4"])
def test_shard_map_divides_codes_and_scales(spec, quantized):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    q, x = cases.parameter(quantized), cases.rows()
    name, _ = spec

    def local(x, w):
        out = x @ w
        return lax.psum(out, "d") if name == "d" else out

    def apply(w, x):
        rows = jax.P(None, name)
        sharded = jax.shard_map(
            local, mesh=mesh, in_specs=(rows, spec), out_specs=jax.P(None, spec[1])
        )
        return sharded(x, w)

    found = jax.jit(jq.lift(apply, strict=True))(q, x)
    np.testing.assert_allclose(found, x @ q.dequantize(), rtol=1e-4, atol=1e-3)


def test_shard_map_gives_each_device_its_rows_and_the_whole_parameter():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    q, x = cases.parameter("int4 g32"), cases.rows()
    x = jnp.concatenate([x, x, x, x])

    def apply(w, x):
        specs = jax.P("d"), jax.P()
        return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=specs, out_specs=jax.P("d"))(x, w)

    found = jax.jit(jq.lift(apply, strict=True))(q, x)
    np.testing.assert_allclose(found, x @ q.dequantize(), rtol=1e-4, atol=1e-3)


def test_sharding_constraints_reach_codes_and_scales():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    q, x = cases.parameter("int4 g32"), cases.rows()

    def apply(w, x):
        sharding = jax.NamedSharding(mesh, jax.P("a", "b"))
        return x @ lax.with_sharding_constraint(w, sharding)

    found = jax.jit(jq.lift(apply, strict=True))(q, x)
    np.testing.assert_allclose(found, x @ q.dequantize(), rtol=1e-4, atol=1e-3)
    program = jax.make_jaxpr(jq.lift(apply))(q, x)
    constrained = [s.eqn for s in walk(program) if s.eqn.primitive.name == "sharding_constraint"]
    shapes = [getattr(eqn.invars[0].aval, "shape", None) for eqn in constrained]
    specs = {n: eqn.params["sharding"].spec for n, eqn in zip(shapes, constrained, strict=True)}
    assert specs == {(64, 96): jax.P("a", "b"), (2, 96): jax.P("a", "b")}
