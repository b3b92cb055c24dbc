"""How devices share a product whose weights stay where they are."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import SCHEMES, ArrayConfig, Rule, matmul, specs, tree
from jaxquant.ops import shares
from jaxquant.ops.dot_spec import DotSpec
from jaxquant.ops.shares import Part, Shares, own_shape

from .products import normal, quantized

# (axes of lhs, of rhs) contracted and batch; what divides lhs and rhs; what does then: of lhs, and
# of the result. The axes of the mesh have 4 and 2 devices.
CASES = {
    "columns": ((((1,), (1,)), ((), ())), "b-", "a-", "b-", "ba"),
    "rows": ((((1,), (1,)), ((), ())), "b-", "-a", "ba", "b-"),
    "both on one axis": ((((1,), (1,)), ((), ())), "a-", "a-", "--", "-a"),
    "the activations move": ((((1,), (1,)), ((), ())), "-a", "--", "--", "--"),
    "several contracted": ((((1, 2), (1, 0)), ((), ())), "---", "ab-", "-ba", "--"),
    "batch": ((((2,), (2,)), ((0,), (0,))), "-b-", "a--", "ab-", "ab-"),
    "pieces that are not even": ((((1,), (1,)), ((), ())), "--", "c-", "--", "--"),
}


def names(letters):
    return tuple(() if letter == "-" else (letter,) for letter in letters)


@pytest.mark.parametrize("name", CASES)
def test_the_weights_stay_and_the_activations_move(name):
    (contract, batch), of_lhs, of_rhs, wanted, of_result = CASES[name]
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    # The axis c cannot be divided among 4 devices.
    lengths = {"-": 8, "a": 8, "b": 8, "c": 6}
    rhs = quantized(normal(*(lengths[n] for n in of_rhs)), ArrayConfig(), axis=-1)
    lhs = jnp.ones([8] * len(of_lhs))
    free = len(of_lhs) + len(of_rhs) - 2 * len(contract[0]) - len(batch[0])
    spec = DotSpec(contract, batch, tuple(range(free)), np.dtype("float32"), None, None)
    given = ([None if n == "-" else n.replace("c", "a") for n in x] for x in (of_lhs, of_rhs))

    found = Shares.where_they_are(lhs, rhs, spec, (mesh, *given))

    assert found.of_lhs == names(wanted)
    assert found.of_rhs == names(of_rhs.replace("c", "-"))
    assert found.of_result == names(of_result)


@pytest.mark.parametrize(
    "length, spec, shape", [(8, "a", 2), (1, None, 1), (6, None, 3), (12, "a", 3)]
)
def test_blocks_that_span_devices_are_cut(length, spec, shape):
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    part = Part((length,), (("a",),), mesh)
    assert part.spec == (spec and (spec,),)
    assert own_shape(part.shape, part.counts) == (shape,)


def typed(x, on, *spec):
    return jax.tree.map(lambda a: jax.device_put(a, jax.NamedSharding(on, jax.P(*spec))), x)


def test_types_say_how_both_and_the_stack_are_divided():
    on = jax.make_mesh((4, 2), ("a", "b"))
    rhs = typed(quantized(normal(8, 8), ArrayConfig(), axis=-1), on, "a")
    stack = jax.tree.map(lambda x: jnp.stack([x, x, x]), rhs)
    spec = DotSpec(((1,), (1,)), ((), ()), (0, 1), np.dtype("float32"), None, None)
    spec = spec.with_arrays(stack, jnp.int32(1))
    lhs = typed(jnp.ones((4, 8)), on, "b")

    found = Shares.of_types(lhs, rhs, spec)

    assert found is not None
    specs = [part.spec for part in found.parts(lhs, rhs)]
    rows, columns, layers = (("b",), None), (("a",), None), (None, ("a",), None)
    assert specs == [rows, columns, columns, layers, layers, ()]
    # JAX would not know where the result lies.
    lhs = typed(jnp.ones((4, 8)), on, "a")
    assert Shares.of_types(lhs, rhs, spec) is None
    assert Shares.of_types(lhs, rhs, dataclasses.replace(spec, out_sharding=jax.P())) is not None
    assert Shares.of_types(jnp.ones((4, 8)), rhs.dequantize(), spec) is None


# Types that are added, in a program before XLA divides it.
_ADDED = r"all_reduce.*?bb0\(%\w+: tensor<(\w+)>"


@pytest.mark.some_rows(3)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scheme", ["W8A8", "W8A16", "W4A16"])
def test_xla_adds_parts_of_typed_arrays_in_the_dtype_of_the_result(scheme, dtype, monkeypatch):
    """XLA would add parts of 16 bits in the 32 bits of its sums, and send twice the bytes."""
    monkeypatch.setattr(shares, "_HALVES", 4 * 6)
    x, w = normal(4, 1024).astype(dtype), jnp.asarray(normal(1024, 6)).astype(dtype)
    q = tree.quantize({"w": w}, [Rule("w", SCHEMES[scheme])])["w"]
    row = "integer" if scheme == "W8A8" else "dequantize"
    on = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    divided = jax.tree.map(partial(jax.NamedSharding, on), specs(q, jax.P("a"), on))
    rows, parts = jax.NamedSharding(on, jax.P("b")), jax.device_put(q, divided)
    run = jax.jit(partial(matmul, out_sharding=jax.P("b"), implementation=row))
    with jax.set_mesh(on):
        out = run(jax.device_put(x, rows), parts)
        texts = [run.lower(jax.device_put(x[:n], rows), parts).as_text() for n in (4, 2)]

    found, of_fewer = (re.findall(_ADDED, text, re.DOTALL) for text in texts)
    assert of_fewer == []
    assert found == {"bfloat16": ["bf16"], "float16": ["f16"], "float32": []}[dtype]
    assert (out.dtype, jax.typeof(out).sharding.spec) == (dtype, jax.P("b", None))
    whole, found = (np.asarray(y, np.float32) for y in (matmul(x, q), out))
    # Each of four parts, which are as large as the whole, and each of their sums is rounded.
    assert np.abs(found - whole).max() <= 8 * jnp.finfo(dtype).eps * np.abs(whole).max()
