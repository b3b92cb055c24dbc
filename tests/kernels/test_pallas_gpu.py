"""The Pallas kernel for GPUs: what it computes, in interpret mode, and that it becomes Triton's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.shapes import WEIGHTS
from jaxquant import INT4, ArrayConfig
from jaxquant.kernels import pallas_gpu

from .. import oracles
from ..ops.products import normal, weight
from ..triton import needs_lowering

pytestmark = pytest.mark.usefixtures("quick_compilation")


def int4(**options):
    return ArrayConfig(format=INT4, axis=0, **options)


# Dtype of x, rows, (K, N), config, programs among which sums are split.
CASES = {
    "one row, split": ("bfloat16", 1, (2048, 200), int4(group_size=128), 4),
    "32 columns of zero points": ("float32", 9, (384, 32), int4(group_size=32, symmetric=False), 3),
    "float16": ("float16", 64, (192, 70), int4(group_size=64, symmetric=False), 1),
    "two tiles of rows": ("bfloat16", 70, (96, 33), int4(), 1),
    "short groups": ("bfloat16", 17, (80, 65), int4(group_size=16), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_grouped_dot_matches_numpy(name):
    dtype, rows, shape, config, splits = CASES[name]
    q, x = weight(config, shape).reorder((-1, -2)), jnp.asarray(normal(rows, shape[0]), dtype)

    run = jax.jit(partial(pallas_gpu.grouped_dot, interpret=True))
    got = np.asarray(run(x, q.codes, q.scale, q.zero_point), np.float64)

    values, x = oracles.dequantize(q), np.asarray(x, np.float64)
    assert got.shape == (rows, shape[1])
    np.testing.assert_array_less(np.abs(got - x @ values), 2e-6 * np.abs(x) @ np.abs(values))
    program = str(jax.make_jaxpr(pallas_gpu.grouped_dot)(jnp.asarray(x), q.codes, q.scale))
    assert f"f32[{splits},{rows},{shape[1]}]" in program


def as_lowered(x, w, scale, zero=None):
    """The program for a GPU that is not there, as text."""
    traced = jax.jit(pallas_gpu.grouped_dot).trace(x, w, scale, zero)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_lowering
@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
def test_the_kernel_takes_the_codes_as_they_lie(wide):
    q = weight(int4(group_size=64, symmetric=False), (192, 33)).reorder((-1, -2))
    with jax.enable_x64(wide):
        text = as_lowered(jnp.zeros((5, 192), jnp.bfloat16), q.codes, q.scale, q.zero_point)
    (line,) = (line for line in text.splitlines() if "gpu.triton" in line)
    assert "tensor<33x3x64xi4>" in line
    # A reshape is free; a conversion of all codes would be a pass over the memory.
    codes = ("tensor<33x192xi4>", "tensor<33x3x64xi4>")
    (reshape,) = (line for line in text.splitlines() if any(f"({c}" in line for c in codes))
    assert "stablehlo.reshape" in reshape


@pytest.mark.parametrize("length, groups, size", [(120, 5, 24), (1000, 1, 1000), (35, 1, 35)])
def test_groups_that_no_step_divides_are_refused(length, groups, size):
    reason = f"groups of {size} are no multiple of 16"
    assert pallas_gpu.refuses_groups(length, groups) == reason


@pytest.mark.parametrize("shape", sorted(set(WEIGHTS) - {"odd"}))
def test_the_groups_of_the_benchmarks_are_taken(shape):
    length = WEIGHTS[shape][0]
    for group in (32, 128, length):
        assert pallas_gpu.refuses_groups(length, length // group) is None


def test_without_triton_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(pallas_gpu, "triton", None)
    assert pallas_gpu.refuses_groups(256, 2) == "this JAX has no Triton"
