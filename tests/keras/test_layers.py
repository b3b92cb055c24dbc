"""Every layer, in every mode and policy: error, files, and `predict`. One table."""

from typing import Any

import keras
import numpy as np
import pytest

from jaxquant import NF4A16
from jaxquant.keras import Config, Int4QuantizationConfig

from .convolution_cases import CONVOLUTION
from .layer_cases import CORE
from .recurrent_cases import RECURRENT

CASES = CORE + CONVOLUTION + RECURRENT
# What the numbers imply for Gaussian weights: half a step against the root mean square.
MODES = {
    "int8": ("int8", 0.012),
    "int4 per channel": (Int4QuantizationConfig(block_size=None), 0.16),
    "int4 block 128": (Int4QuantizationConfig(block_size=128), 0.15),
    "int4 block 32": (Int4QuantizationConfig(block_size=32), 0.12),
    "float8": ("float8", 0.07),
    "nf4": (Config(NF4A16), 0.15),
}


def relative_error(found, wanted):
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def quantize(model, mode):
    model.quantize(mode) if isinstance(mode, str) else model.quantize(config=mode)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layer_is_near_the_float_one_and_comes_back_from_files(case, mode, policy, tmp_path):
    keras.utils.set_random_seed(0)
    inputs = case.inputs(np.random.default_rng(0), (4, *case.input_shape))

    def build():
        start = keras.Input(case.input_shape, dtype=inputs.dtype.name)
        return keras.Sequential([start, case.make(dtype=policy)])

    model: Any = build()
    config, bound = MODES[mode]
    wanted = np.asarray(model(inputs), np.float32)
    quantize(model, config)
    found = np.asarray(model(inputs), np.float32)

    assert 0 < relative_error(found, wanted) <= bound * case.products**0.5
    # XLA fuses more under predict: products and sums of floats round once less.
    step = 2e-6 if policy == "float32" else 1e-2
    predicted = np.asarray(model.predict(inputs, verbose=0), np.float32)
    assert relative_error(predicted, found) <= step

    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(np.asarray(loaded(inputs), np.float32), found)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = build()
    fresh.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(np.asarray(fresh(inputs), np.float32), found)
