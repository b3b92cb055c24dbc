"""Functions that are jitted with shardings, inside of a lifted function."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jaxquant as jq
from jaxquant.jaxprs import walk

from ..ops.products import normal
from . import cases

X = cases.normal(4, cases.K)


def mesh_of(*kinds):
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=kinds)


def sharded_call(mesh, axes=("a", "b")):
    """Of activations and a parameter: their product, the parameter, and its transpose."""
    rows, kernel = (jax.NamedSharding(mesh, jax.P(*names)) for names in ((None, axes[0]), axes))
    swapped = jax.NamedSharding(mesh, jax.P(*axes[::-1]))
    return jax.jit(
        lambda x, w: (x @ w, w, w.T),
        in_shardings=(rows, kernel),
        out_shardings=(None, kernel, swapped),
    )


def constraints(program):
    """The shape and spec of each array of a program that is constrained."""
    found = [s.eqn for s in walk(program) if s.eqn.primitive.name == "sharding_constraint"]
    shapes = [getattr(eqn.invars[0].aval, "shape", ()) for eqn in found]
    return [(n, eqn.params["sharding"].spec) for n, eqn in zip(shapes, found, strict=True)]


def spec_of(x: Any) -> jax.P:
    return x.sharding.spec


MESH = mesh_of(AxisType.Auto, AxisType.Auto)


def apply(w, x):
    y, w, swapped = sharded_call(MESH)(x, w)
    return y @ swapped, w


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantized, is_swapped", [("int4 g32", False), ("int4 g16 asymmetric", True)]
)
def test_codes_keep_the_sharding_and_nothing_is_dequantized(quantized, is_swapped):
    q = cases.parameter(quantized, is_swapped)
    found, same = jax.jit(jq.lift(apply, strict=True))(q, X)
    w = np.asarray(q.dequantize())
    np.testing.assert_allclose(found, X @ w @ w.T, rtol=1e-4, atol=1e-2)
    assert not jq.explain(jq.lift(apply), q, X).dequantized

    assert isinstance(same, jq.QTensor)
    np.testing.assert_array_equal(same.dequantize(), q.dequantize())
    names = ("b", "a") if is_swapped else ("a", "b")
    assert spec_of(same.codes) == spec_of(same.scale) == jax.P(*names)


def test_every_operand_and_result_is_constrained():
    q = cases.parameter("int8")
    program = jax.make_jaxpr(jq.lift(apply))(q, X)
    codes, scale = ((64, 96), jax.P("a", "b")), ((1, 96), jax.P(None, "b"))
    # Activations; the parameter as operand, as result, and transposed: the stored order stays.
    assert constraints(program) == [((4, 64), jax.P(None, "a")), *[codes, scale] * 3]


def test_a_lifted_function_that_is_not_jitted_shards_too():
    found, same = jq.lift(sharded_call(MESH))(X, cases.parameter("int8"))[:2]
    np.testing.assert_allclose(found, X @ same.dequantize(), rtol=1e-4, atol=1e-3)
    assert spec_of(same.codes) == jax.P("a", "b")


def test_types_with_explicit_axes_say_how_arrays_are_sharded():
    mesh = mesh_of(AxisType.Explicit, AxisType.Explicit)
    q = cases.parameter("int8")
    spec = dataclasses.replace(q, codes=jax.P(None, "b"), scale=jax.P(None, "b"))
    q = jax.device_put(q, jax.tree.map(lambda s: jax.NamedSharding(mesh, s), spec))

    def apply(w, x):
        return sharded_call(mesh, (None, "b"))(x, w)[:2]

    with jax.set_mesh(mesh):
        found, same = jax.jit(jq.lift(apply, strict=True))(q, X)
    np.testing.assert_allclose(found, X @ q.dequantize(), rtol=1e-4, atol=1e-3)
    assert spec_of(same.codes) == spec_of(found) == jax.P(None, "b")


def scanned(params, tokens):
    """A lookup, a loop over layers whose kernels are divided, and the table as the head."""
    everywhere = jax.P() if jax.sharding.get_abstract_mesh().explicit_axes else None

    def layer(x, weights):
        up = jnp.tanh(x @ weights["up"])
        return x + jnp.matmul(up, weights["down"], out_sharding=everywhere), None

    x = params["table"].at[tokens].get(out_sharding=everywhere)
    x, _ = jax.lax.scan(layer, x, params["layers"])
    return x @ params["table"].T


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("scheme", ["W8A8", "W4A16"])
def test_functions_with_out_sharding_keep_parameters_quantized(scheme):
    shapes = {"table": (64, 256), "layers": {"up": (2, 256, 512), "down": (2, 512, 256)}}
    floats = jax.tree.map(
        lambda s: jnp.asarray(normal(*s)), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    tokens = jnp.arange(6).reshape(3, 2)
    rules = jq.uses(scanned, floats, tokens).rules(jq.SCHEMES[scheme])
    params = jq.tree.quantize(floats, rules)
    layers = {"up": jax.P(None, None, "b"), "down": jax.P(None, "b")}
    mesh = mesh_of(AxisType.Explicit, AxisType.Explicit)

    def place(q, spec):
        return jax.device_put(
            q, jax.tree.map(lambda s: jax.NamedSharding(mesh, s), jq.specs(q, spec, mesh))
        )

    is_quantized = jq.tree.is_quantized
    spec = {"table": jax.P("b"), "layers": layers}
    parts = jax.tree.map(place, params, spec, is_leaf=is_quantized)
    lifted = jq.lift(scanned, strict=True)
    with jax.set_mesh(mesh):
        placed = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P()))
        found = jax.jit(lifted)(parts, placed)
        assert not jq.explain(lifted, parts, placed).dequantized
    assert jax.typeof(found).sharding.spec == jax.P(None, None, "b")
    np.testing.assert_allclose(found, jax.jit(lifted)(params, tokens), rtol=1e-4, atol=1e-2)


def test_meshes_with_axes_of_both_kinds_dequantize():
    mesh = mesh_of(AxisType.Auto, AxisType.Explicit)
    call = sharded_call(mesh, ("a", None))
    with pytest.raises(ValueError, match=r"0 in .*its mesh has both automatic and explicit axes"):
        jax.eval_shape(jq.lift(lambda w: call(X, w)[0], strict=True), cases.parameter("int8"))


def test_adapters_and_trained_parameters_are_not_dequantized():
    kernel = {"w": cases.parameter("int8").dequantize()}
    rule = jq.Rule("w", jq.W8A16, axis=0)
    adapted = jax.eval_shape(
        lambda kernel: jq.training.lora_init(kernel, rule, 4, key=jax.random.key(0)), kernel
    )
    prepared = jq.training.prepare(kernel, rule)
    for params in (adapted, prepared):
        program = jax.make_jaxpr(jq.lift(lambda p: apply(p["w"], X)[0], strict=True))(params)
        # Codes, in whatever order they are stored.
        assert (64, 96) in {tuple(sorted(shape)) for shape, _ in constraints(program)}
    everywhere = jax.NamedSharding(mesh_of(AxisType.Explicit, AxisType.Explicit), jax.P())

    def moved(p):
        return jax.sharding.reshard(p["w"], everywhere)

    with pytest.raises(ValueError, match="its arrays are sharded in other ways"):
        jax.eval_shape(jq.lift(moved, strict=True), adapted)
    # A step of training returns an array, not the QTensor of this step.
    result = jax.eval_shape(jq.lift(lambda p: apply(p["w"], X)[1]), prepared)
    assert isinstance(result, jax.ShapeDtypeStruct)
