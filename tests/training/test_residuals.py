"""Quantized operands that the backward pass keeps, alone and in loops over layers."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant import training
from jaxquant.core import bits_of
from jaxquant.training.residuals import Residual

from ..ops.products import normal

LAYERS = 3
DTYPES = ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn", "bfloat16", "float16")
DTYPES += ("int4", "uint4", "int8", "float32")
RECIPES = ("FP8_TRAINING", "FP8_BLOCKS", "MXFP8_TRAINING", "NVFP4_TRAINING", "INT8_TRAINING")


def every_code(dtype, shape):
    """As many bit patterns as there is room for, of 8 bits all in 256 elements."""
    width = bits_of(dtype)
    if width > 8:
        return jnp.asarray(np.resize([0.1, -0.0, np.nan, np.inf, -3.0], shape), dtype)
    codes = np.random.default_rng(0).permutation(2**width).astype(np.uint8)
    codes = jnp.asarray(np.resize(codes, shape)).astype(f"uint{width}")
    return lax.bitcast_convert_type(codes, jnp.dtype(dtype))


def bits(x):
    return np.asarray(x).view(f"uint{8 * x.dtype.itemsize}")


@pytest.mark.parametrize("shape", [(16, 16), (16, 2), (3, 7), (0, 4), (), (5,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_are_restored_bit_for_bit(dtype, shape):
    x = every_code(dtype, shape)
    round_trip = lambda x: Residual.of(x).restore()  # noqa: E731
    kept = Residual.of(x)
    for run in (round_trip, jax.jit(round_trip), jax.jit(lambda _: kept.restore())):
        found = run(x)
        assert (found.dtype, found.shape) == (x.dtype, x.shape)
        np.testing.assert_array_equal(bits(found), bits(x))


def test_on_cpu_they_are_kept_as_bytes_and_elsewhere_as_they_are(monkeypatch):
    tree = {name: every_code(name, (4, 6)) for name in DTYPES}
    stored = Residual.of(tree).stored
    assert {stored[name].dtype.name for name in DTYPES[:3]} == {"uint8"}
    for name in ("float4_e2m1fn", "int4", "uint4"):
        assert (stored[name].dtype.name, stored[name].shape) == ("uint8", (4, 3))
    assert stored["bfloat16"].dtype == jnp.uint16
    assert stored["int8"] is tree["int8"]
    assert stored["float32"] is tree["float32"]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert Residual.of(tree).stored == tree


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("length", [6, 8])
def test_each_device_keeps_its_part(length, kind):
    mesh = jax.make_mesh((2,), ("a",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        x = every_code("float4_e2m1fn", (4, length))
        x = jax.device_put(x, NamedSharding(mesh, P(None, "a")))
        stored, found = jax.jit(lambda x: (Residual.of(x).stored, Residual.of(x).restore()))(x)
    # Parts of three elements do not fill bytes, where types say that there are such parts.
    is_whole = length == 8 or kind is AxisType.Auto
    assert stored.dtype == (jnp.uint8 if is_whole else jnp.uint4)
    np.testing.assert_array_equal(bits(found), bits(x))
    if length == 8:
        assert stored.sharding.spec == found.sharding.spec == P(None, "a")


def in_a_loop(config, x, kernels):
    key = jax.random.key(0) if config.rounds_stochastically else None

    def layer(x, kernel):
        return jnp.tanh(training.matmul(x, kernel, config=config, key=key)), None

    return jnp.sum(lax.scan(layer, x, kernels)[0] ** 2)


def one_by_one(config, x, kernels):
    key = jax.random.key(0) if config.rounds_stochastically else None
    for kernel in kernels:
        x = jnp.tanh(training.matmul(x, kernel, config=config, key=key))
    return jnp.sum(x**2)


@pytest.mark.parametrize("name", RECIPES)
def test_a_loop_does_not_convert_the_whole_stack_in_each_step(name):
    config = getattr(training, name)
    x, kernels = normal(16, 64), normal(LAYERS, 64, 64, seed=1) / 8
    gradients = jax.jit(jax.grad(partial(in_a_loop, config), (0, 1)))
    text = gradients.lower(x, kernels).compile().as_text()
    # XLA would have the stack in wider elements, and convert it back.
    stacks = rf"\w+\[{LAYERS},(?:16|64),(?:64|32)\]\S* convert\("
    assert text
    assert not re.findall(stacks, text)
    found = gradients(x, kernels)
    wanted = jax.jit(jax.grad(partial(one_by_one, config), (0, 1)))(x, kernels)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
