"""Random configurations of stock layers: converted, quantized, saved and loaded, bit for bit."""

import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import keras
import numpy as np
import pytest

from jaxquant.keras import compat, convert, quantize

from .random_layers import KINDS, POLICIES, SCHEMES, Drawn


def model_of(drawn: Drawn, dtype: str) -> Any:
    inputs = keras.Input(drawn.shape, dtype="int32" if drawn.tokens else "float32")
    layer = drawn.make(dtype)
    takes_value = "Attention" in drawn.layer.__name__
    return keras.Model(inputs, layer(inputs, inputs) if takes_value else layer(inputs))


def inputs_of(drawn: Drawn) -> np.ndarray:
    rng, shape = np.random.default_rng(0), (2, *drawn.shape)
    if drawn.tokens:
        return rng.integers(0, drawn.tokens, shape).astype(np.int32)
    return rng.normal(size=shape).astype(np.float32)


def state(model):
    """The values of all variables by the classes and names of their layers."""
    values = {}
    for place, layer in enumerate(compat.sublayers(model)):
        for variable in compat.own_variables(layer):
            values[place, layer.name, variable.name] = np.asarray(variable.value)
    return values


def check_same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype, key
        np.testing.assert_array_equal(found[key].view(np.uint8), value.view(np.uint8), str(key))


def check(drawn, dtype, scheme):
    model, inputs = model_of(drawn, dtype), inputs_of(drawn)
    before, exact = state(model), np.asarray(model(inputs))
    converted = convert(model)
    np.testing.assert_array_equal(np.asarray(converted(inputs)), exact)

    quantized, report = quantize(model, scheme)
    assert any(row.scheme for row in report.rows)
    check_same(state(model), before)
    outputs, held = np.asarray(quantized(inputs)), state(quantized)
    assert outputs.shape == exact.shape
    assert outputs.dtype == exact.dtype
    assert np.all(np.isfinite(outputs.astype(np.float32)))
    if isinstance(scheme, str):  # In place, as stock Keras quantizes.
        in_place = convert(model)
        in_place.quantize(scheme)
        np.testing.assert_array_equal(np.asarray(in_place(inputs)), outputs)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quantized.save(folder / "model.keras")
        quantized.save_weights(folder / "model.weights.h5")
        loaded: Any = keras.saving.load_model(folder / "model.keras")
        converted.load_weights(folder / "model.weights.h5")
    check_same(state(loaded), held)
    for found in (loaded, converted):
        np.testing.assert_array_equal(np.asarray(found(inputs)), outputs)


OPTIONS = {"dtype": st.sampled_from(POLICIES), "scheme": st.sampled_from(SCHEMES)}
SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}


@hypothesis.settings(max_examples=5, **SETTINGS)
@hypothesis.given(drawn=st.one_of(*KINDS.values()), **OPTIONS)
def test_random_layers_are_saved_and_loaded_bit_for_bit(drawn, dtype, scheme):
    check(drawn, dtype, scheme)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_random_layers_of_each_kind_are_saved_and_loaded_bit_for_bit(kind):
    # Else all kinds would get the same dtypes and schemes, and hypothesis would vary a few kinds.
    @hypothesis.seed(list(KINDS).index(kind))
    @hypothesis.settings(max_examples=10, **SETTINGS)
    @hypothesis.given(drawn=KINDS[kind], **OPTIONS)
    def run(drawn, dtype, scheme):
        check(drawn, dtype, scheme)
        jax.clear_caches()

    run()
