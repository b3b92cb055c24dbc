"""What runs where XLA partitions the program among devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from jaxquant import SCHEMES, Rule, explain, matmul, tree
from jaxquant.kernels import cpu

K, N = 256, 1024
MESH = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))
SHARDED = jax.NamedSharding(MESH, jax.P("a", None))
REPLICATED = jax.NamedSharding(MESH, jax.P())
HAS_NATIVE = cpu.unavailable() is None
WHY = "XLA cannot partition it among devices"


def shapes(tree, sharding=None):
    def one(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def weight(scheme, platform="cpu", dtype=jnp.float32):
    w = {"w": jax.ShapeDtypeStruct((K, N), dtype)}
    rules = [Rule("w", SCHEMES[scheme])]
    return jax.eval_shape(lambda w: tree.quantize(w, rules, platform=platform), w)["w"]


X = jax.ShapeDtypeStruct((3, K), jnp.float32)


@pytest.mark.skipif(not HAS_NATIVE, reason=str(cpu.unavailable()))
@pytest.mark.parametrize("scheme", ["W8A8", "W8A16", "W4A16"])
def test_the_row_names_what_is_lowered_for_one_cpu_and_for_several(scheme):
    q = weight(scheme)
    for given, is_native in ((shapes(q), True), (shapes(q, SHARDED), False)):
        (row,) = explain(matmul, X, given, platform="cpu")
        assert (row.implementation == "native") == is_native
        assert (("native", WHY) in row.not_selected) != is_native
        text = jax.jit(matmul).lower(X, given).as_text()
        assert ("jaxquant_dot" in text) == is_native
        # What is not partitioned has no loop over blocks either.
        assert row.implementation != "blocks"
        assert "stablehlo.while" not in text


@pytest.mark.skipif(not HAS_NATIVE, reason=str(cpu.unavailable()))
def test_each_way_to_use_several_devices_is_seen():
    q = weight("W8A8")

    def constrained(x, q):
        return matmul(jax.lax.with_sharding_constraint(x, REPLICATED), q)

    def mapped(x, q):
        spec = jax.P()
        return jax.shard_map(matmul, mesh=MESH, in_specs=(spec, spec), out_specs=spec)(x, q)

    def run(function, *args):
        return [row.implementation for row in explain(function, *args, platform="cpu")]

    assert run(matmul, X, shapes(q, REPLICATED)) == ["integer"]
    assert run(matmul, shapes(X, REPLICATED), q) == ["integer"]
    assert run(constrained, X, q) == ["integer"]
    assert run(jax.jit(matmul, out_shardings=REPLICATED), X, q) == ["integer"]
    with jax.set_mesh(MESH):
        assert run(matmul, X, q) == ["integer"]
    assert run(mapped, X, shapes(q, REPLICATED)) == ["native"]
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert run(matmul, X, shapes(q, one)) == ["native"]
    both = run(lambda x, q: mapped(x, q) + matmul(x, q), X, q)
    assert both == ["native", "integer"]


@pytest.mark.skipif(not HAS_NATIVE, reason=str(cpu.unavailable()))
def test_a_forced_row_that_cannot_be_partitioned_is_explained():
    def forced(x, q):
        return matmul(x, q, implementation="blocks")

    q = shapes(weight("W8A16"), SHARDED)
    (row,) = explain(forced, X, q, platform="cpu")
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
