"""Programs that `jax.export` writes for any batch size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxquant as jq


def with_groups(scheme):
    weights = dataclasses.replace(scheme.weights, group_size=32)
    return dataclasses.replace(scheme, weights=weights)


SCHEMES = {
    "W8A8": jq.W8A8,
    "W8A16": jq.W8A16,
    "W4A8 in groups": with_groups(jq.W4A8),
    "NF4A16": jq.NF4A16,
    "FP8": jq.FP8,
}


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda", "tpu")], ids=len)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_product_is_exported_for_any_number_of_rows(name, platforms):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
    q = jq.tree.quantize({"kernel": kernel}, SCHEMES[name])["kernel"]

    def product(x):
        return jq.matmul(x, q)

    (rows,) = export.symbolic_shape("rows")
    like = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
    exported = export.export(jax.jit(product), platforms=platforms)(like)
    for count in (1, 3):
        x = jnp.asarray(rng.normal(size=(count, 64)), jnp.float32)
        np.testing.assert_allclose(exported.call(x), product(x), rtol=1e-4, atol=1e-4)


def test_a_product_is_exported_for_any_number_of_columns():
    """The symbolic shape is that of the second operand."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
    q = jq.tree.quantize({"kernel": kernel}, jq.W8A8)["kernel"]

    def product(x):
        return jq.einsum("kn,km->nm", q, x)

    (columns,) = export.symbolic_shape("columns")
    like = jax.ShapeDtypeStruct((64, columns), jnp.float32)
    exported = export.export(jax.jit(product))(like)
    x = jnp.asarray(rng.normal(size=(64, 3)), jnp.float32)
    np.testing.assert_allclose(exported.call(x), product(x), rtol=1e-4, atol=1e-4)


def test_a_row_for_one_platform_is_not_for_symbolic_shapes():
    (rows,) = export.symbolic_shape("rows")
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
    q = jq.tree.quantize({"kernel": kernel}, jq.W8A8)["kernel"]
    like = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
    exported = export.export(jax.jit(lambda x: jq.matmul(x, q)))(like)
    text = exported.mlir_module()
    assert "custom_call @" not in text.replace("@shape_assertion", "")
    assert "i8" in text
