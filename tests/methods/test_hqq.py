from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant import INT4, INT8, ArrayConfig, MinMSE
from jaxquant.methods import HQQ, Method

from .. import oracles
from . import inputs

CONFIG = ArrayConfig(format=INT4, group_size=12, symmetric=False)
CASES = {
    "int4-g12": CONFIG,
    "int4-row": ArrayConfig(format=INT4, symmetric=False, range=MinMSE()),
    "int2-g6": ArrayConfig(format=jq.INT2, group_size=6, symmetric=False),
    "uint4-g8": ArrayConfig(format=jq.FILE_FORMATS["uint4"], group_size=8, symmetric=False),
    "int8-g12": ArrayConfig(format=INT8, group_size=12, symmetric=False),
    "bfloat16": ArrayConfig(format=INT4, group_size=12, symmetric=False, scale_dtype="bfloat16"),
}


def oracle(group, scale, qmin, qmax, store, iterations, p=0.7, beta=10.0):
    """HQQ of one group in float64, with all scores; the offset of the best."""
    low = min(group.min(), 0.0)
    offset = store(low - qmin * scale)
    best, least = offset, np.inf
    for _ in range(iterations + 1):
        codes = np.clip(np.round((group - offset) / scale), qmin, qmax)
        error = (group - codes * scale - offset) / scale
        score = np.sum(np.abs(error) ** p)
        if score < least:
            best, least = offset, score
        size = np.maximum(np.abs(error), 1e-30)
        shrunk = np.sign(error) * np.maximum(size - size ** (p - 1) / beta, 0)
        offset = store(np.mean(group - codes * scale - shrunk * scale))
    return best, least


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", [n for n in CASES if n != "int4-row"])
@pytest.mark.parametrize("iterations", [1, 20])
def test_offsets_match_the_oracle(name, iterations):
    config: Any = CASES[name]
    weight = inputs.weights()
    q: Any = HQQ(iterations=iterations)(jnp.asarray(weight), {}, config, 1)
    scale, size = np.asarray(q.scale, np.float64), config.group_size
    assert q.zero_point is None
    assert q.offset.shape == q.scale.shape
    assert q.offset.dtype == q.scale.dtype

    def store(x):
        return np.float64(np.asarray(x, q.offset.dtype))

    values = oracles.dequantize(q)
    for row in range(len(weight)):
        for j in range(scale.shape[1]):
            part = slice(j * size, (j + 1) * size)
            group, step = weight[row, part].astype(np.float64), scale[row, j]
            bounds = config.format.qmin, config.format.qmax
            _, least = oracle(group, step, *bounds, store, iterations)
            found = np.sum(np.abs((values[row, part] - group) / step) ** 0.7)
            # Codes at a tie may differ, after which iterations differ.
            assert found <= least * 1.05 + 1e-6
            first = (group - float(q.offset[row, j])) / step
            nearest = np.clip(np.round(first), config.format.qmin, config.format.qmax)
            ties = np.abs(np.abs(first - np.floor(first)) - 0.5) < 1e-3
            codes = oracles.code_values(q.codes[row, part], config.format)
            np.testing.assert_array_equal(codes[~ties], nearest[~ties])


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 3))
def test_no_group_is_worse_than_at_its_start(seed, mean):
    weight = inputs.weights(seed=seed) + np.float32(mean)
    errors = []
    for method in (HQQ(), HQQ(iterations=0)):
        values = np.asarray(method(jnp.asarray(weight), {}, CONFIG, 1).dequantize(), np.float64)
        errors.append(np.sum(np.abs(values - weight).reshape(9, 2, 12) ** 0.7, 2))
    assert np.all(errors[0] <= errors[1] * (1 + 1e-4))


@pytest.mark.slow
def test_it_is_better_than_an_integer_zero_point():
    weight = inputs.weights((64, 96))
    config = ArrayConfig(format=INT4, group_size=32, symmetric=False)
    plain = jq.quantize(jnp.asarray(weight), config, 1).dequantize()
    found = HQQ()(jnp.asarray(weight), {}, config, 1).dequantize()
    assert np.mean(np.square(found - weight)) < 0.9 * np.mean(np.square(plain - weight))


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", CASES)
def test_zeros_constants_and_tiny_weights(name):
    config = CASES[name]
    for value in (0.0, 0.5, -3.0, 1e-12):
        q = HQQ()(jnp.full((2, 24), value), {}, config, 1)
        np.testing.assert_allclose(q.dequantize(), value, rtol=1e-2 if name == "bfloat16" else 1e-5)


@pytest.mark.slow
def test_nan_stays_in_its_group():
    weight = inputs.weights()
    expected = HQQ()(jnp.asarray(weight), {}, CONFIG, 1).dequantize()
    weight[2, 3] = np.nan
    found = HQQ()(jnp.asarray(weight), {}, CONFIG, 1).dequantize()
    is_nan = np.zeros(weight.shape, bool)
    is_nan[2, :12] = True
    np.testing.assert_array_equal(np.isnan(found), is_nan)
    np.testing.assert_array_equal(found[~is_nan], expected[~is_nan])


def test_under_jit_and_vmap():
    stack = jnp.stack([jnp.asarray(inputs.weights(seed=seed)) for seed in range(3)])

    def quantize(weight):
        return HQQ()(weight, {}, CONFIG, 1)

    mapped = jax.jit(jax.vmap(quantize))(stack)
    for i, weight in enumerate(stack):
        alone = quantize(weight)
        np.testing.assert_allclose(
            jax.vmap(lambda q: q.dequantize())(mapped)[i], alone.dequantize(), atol=1e-5
        )


def test_files_products_and_explain_support_its_offsets(tmp_path):
    weight, x = inputs.weights((16, 24)).T, inputs.activations(24)
    params = jq.tree.quantize({"kernel": jnp.asarray(weight)}, CONFIG, method=HQQ())
    q = params["kernel"]
    assert q.offset is not None
    jq.save(tmp_path / "hqq.safetensors", params)
    loaded = jq.load(tmp_path / "hqq.safetensors")["kernel"]
    np.testing.assert_array_equal(loaded.dequantize(), q.dequantize())
    found = jax.jit(jq.matmul)(jnp.asarray(x), loaded)
    expected = x.astype(np.float64) @ oracles.dequantize(q)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    rows = jq.explain(jq.matmul, jnp.asarray(x), loaded).rows
    assert len(rows) == 1


def test_it_is_a_method_without_statistics():
    assert isinstance(HQQ(), Method)
    assert HQQ().statistics == ()
    assert hash(HQQ()) == hash(HQQ(0.7))


def test_symmetric_configs_and_bad_settings_raise():
    with pytest.raises(ValueError, match="HQQ chooses an offset, so it needs symmetric=False"):
        HQQ()(jnp.ones((2, 4)), {}, ArrayConfig(format=INT4), 1)
    for fields, got in (({"p": 0}, "p=0 and beta=10.0"), ({"beta": 0}, "p=0.7 and beta=0")):
        with pytest.raises(
            ValueError, match=rf"p must be in \(0, 1\] and beta positive; got {got}"
        ):
            HQQ(**fields)
    with pytest.raises(ValueError, match="iterations must be a nonnegative int; got -1"):
        HQQ(iterations=-1)
