"""What runs where XLA partitions the program among devices."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from jaxquant import SCHEMES, Rule, explain, matmul, tree
from jaxquant.kernels import cpu

K, N = 256, 1024


def mesh(*lengths):
    names = ("a", "b")[: len(lengths)]
    return jax.make_mesh(lengths, names, axis_types=(AxisType.Auto,) * len(names))


MESH = mesh(2)
SHARDED = jax.NamedSharding(MESH, jax.P("a", None))
REPLICATED = jax.NamedSharding(MESH, jax.P())
HAS_NATIVE = cpu.unavailable() is None
WHY = "XLA cannot partition it among devices"


def by_blocks(x, q):
    return matmul(x, q, implementation="blocks")


def shapes(tree, sharding=None):
    def one(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def weight(scheme, platform="cpu", dtype=jnp.float32):
    w = {"w": jax.ShapeDtypeStruct((K, N), dtype)}
    rules = [Rule("w", SCHEMES[scheme])]
    return jax.eval_shape(lambda w: tree.quantize(w, rules, platform=platform), w)["w"]


X = jax.ShapeDtypeStruct((3, K), jnp.float32)


@pytest.mark.some_rows(2)
@pytest.mark.skipif(not HAS_NATIVE, reason=str(cpu.unavailable()))
@pytest.mark.parametrize("scheme", ["W8A8", "W8A16", "W4A16"])
def test_the_row_names_what_is_lowered_for_one_cpu_and_for_several(scheme):
    q = weight(scheme)
    on_six = jax.NamedSharding(mesh(6), jax.P(None))
    for given, is_native in ((shapes(q), True), (shapes(q, SHARDED), True), (shapes(q, on_six), 0)):
        (row,) = explain(matmul, X, given, platform="cpu")
        assert (row.implementation == "native") == is_native
        assert (("native", WHY) in row.not_selected) != is_native
        text = jax.jit(matmul).lower(X, given).compile().as_text()
        assert text is not None
        assert ("jaxquant_dot" in text) == is_native
        # What is not partitioned has no loop over blocks either.
        assert row.implementation != "blocks"
        assert "stablehlo.while" not in text


@pytest.mark.skipif(not HAS_NATIVE, reason=str(cpu.unavailable()))
def test_each_way_to_use_several_devices_is_seen():
    # By blocks, which nothing partitions.
    q = weight("W8A16")

    def constrained(x, q):
        return by_blocks(jax.lax.with_sharding_constraint(x, REPLICATED), q)

    def mapped(x, q, function=by_blocks, on=MESH):
        spec = jax.P()
        part = jax.shard_map(function, mesh=on, axis_names={"a"}, in_specs=spec, out_specs=spec)
        return part(x, q)

    def run(function, *args):
        return [row.implementation for row in explain(function, *args, platform="cpu")]

    assert run(by_blocks, X, shapes(q, REPLICATED)) == ["dequantize"]
    assert run(by_blocks, shapes(X, REPLICATED), q) == ["dequantize"]
    assert run(constrained, X, q) == ["dequantize"]
    assert run(jax.jit(by_blocks, out_shardings=REPLICATED), X, q) == ["dequantize"]
    with jax.set_mesh(MESH):
        assert run(by_blocks, X, q) == ["dequantize"]
    assert run(mapped, X, shapes(q, REPLICATED)) == ["blocks"]
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert run(by_blocks, X, shapes(q, one)) == ["blocks"]
    both = run(lambda x, q: mapped(x, q) + by_blocks(x, q), X, q)
    assert both == ["blocks", "dequantize"]
    # Along one of two axes of the mesh.
    partly = partial(mapped, function=matmul, on=mesh(2, 1))
    assert run(partly, X, q) == ["dequantize"]
    assert "jaxquant_dot" not in jax.jit(partly).lower(X, q).as_text()


@pytest.mark.skipif(not HAS_NATIVE, reason=str(cpu.unavailable()))
def test_a_forced_row_that_cannot_be_partitioned_is_explained():
    q = shapes(weight("W8A16"), SHARDED)
    (row,) = explain(by_blocks, X, q, platform="cpu")
    assert row.is_forced
    assert row.implementation != "blocks"
    assert row.not_selected[0] == ("blocks", WHY)


def test_kernels_for_a_tpu_are_not_partitioned_and_have_no_speeds():
    q = weight("W4A16", "tpu", jnp.bfloat16)
    x = jax.ShapeDtypeStruct((8, K), jnp.bfloat16)
    (row,) = explain(matmul, x, q, platform="v5e")
    assert row.implementation == "pallas"
    (row,) = explain(matmul, x, shapes(q, SHARDED), platform="v5e")
    assert row.implementation != "pallas"
    assert row.not_selected[0] == ("pallas", WHY)
    large = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    q = jax.eval_shape(lambda w: tree.quantize({"w": w}, [Rule("w", SCHEMES["W8A8"])]), large)["w"]
    x = jax.ShapeDtypeStruct((8, 4096), jnp.bfloat16)
    (row,) = explain(matmul, x, q, platform="v5e")
    assert row.speeds
    (row,) = explain(matmul, x, shapes(q, REPLICATED), platform="v5e")
    assert (row.implementation, row.speeds) == ("integer", ())
