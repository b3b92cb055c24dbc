"""Programs that XLA partitions among devices: plain `jit` with arrays sharded over a mesh."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import SCHEMES, Rule, conv_general_dilated, matmul, tree
from jaxquant.kernels import cpu

from .products import normal

ROWS, K, N = 3, 256, 1024
DEVICES = 8


def mesh():
    return jax.make_mesh((DEVICES,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))


def sharded(q, axis):
    """The array with one logical axis of its codes, scales and zero points split over devices."""
    (stored,) = q.stored_axes([axis])

    def place(x):
        spec = [None] * x.ndim
        if x.ndim > stored and x.shape[stored] % DEVICES == 0:
            spec[stored] = "a"
        return jax.device_put(x, jax.NamedSharding(mesh(), jax.P(*spec)))

    return jax.tree.map(place, q)


def weight_of(scheme, seed=0):
    w = {"w": normal(K, N, seed=seed)}
    return tree.quantize(w, [Rule("w", SCHEMES[scheme])], platform="cpu")["w"]


# The weights of these lie as those of others do: codes with scales per column or per group.
ALIKE = ("W8A16", "W4A16", "MXFP8A8", "MXFP4A16")


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in ALIKE])
def test_sharded_weights_stay_where_they_are(scheme):
    q, x = weight_of(scheme), jnp.asarray(normal(ROWS, K))
    parts = [sharded(q, axis) for axis in (0, 1)]

    run = jax.jit(lambda x, parts: [matmul(x, q) for q in parts])

    text = run.lower(x, parts).compile().as_text()
    assert text is not None
    assert "jaxquant_" not in text, "XLA cannot partition native kernels"
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)
    # The activations may be gathered, codes and scales may not.
    assert all(math.prod(map(int, shape.split(","))) <= x.size for shape in shapes), shapes
    wanted = matmul(x, q, implementation="dequantize")
    for out in run(x, parts):
        np.testing.assert_allclose(out, wanted, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("implementation", [None, "images"])
def test_sharded_kernels_of_convolutions_stay_where_they_are(axis, implementation):
    # (outputs, inputs, height, width): the axes are moved.
    rules = [Rule("k", SCHEMES["W8A8"], axis=(1, 2, 3))]
    q = tree.quantize({"k": normal(64, 32, 3, 3)}, rules, platform="cpu")["k"]
    x = jnp.asarray(normal(2, 32, 5, 5))

    def run(x, q, implementation=implementation):
        return conv_general_dilated(x, q, (1, 1), "SAME", implementation=implementation)

    compiled = jax.jit(run).lower(x, sharded(q, axis)).compile()

    text = compiled.as_text()
    assert text is not None
    assert "convolution" in text
    assert "all-gather" not in text
    wanted = run(x, q, "dequantize")
    np.testing.assert_allclose(compiled(x, sharded(q, axis)), wanted, rtol=2e-3, atol=2e-2)


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.parametrize("scheme", ["W8A8", "W4A16"])
def test_replicated_weights_keep_the_native_kernels_inside_shard_map(scheme):
    q, x = weight_of(scheme), jnp.asarray(normal(DEVICES, K))
    specs = {"in_specs": (jax.P("a"), jax.P()), "out_specs": jax.P("a")}

    run = jax.jit(jax.shard_map(matmul, mesh=mesh(), **specs))

    assert "jaxquant_dot" in run.lower(x, q).as_text()
    one_device = jax.jit(matmul)
    assert "jaxquant_dot" in one_device.lower(x, q).as_text()
    np.testing.assert_allclose(run(x, q), one_device(x, q), rtol=1e-5, atol=1e-4)
