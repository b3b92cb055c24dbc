"""Every layer in every mode, and in every policy: error of `predict`, and files. One table."""

import functools
from typing import Any

import jax
import keras
import numpy as np
import pytest

from jaxquant import NF4A16
from jaxquant.keras import Int4QuantizationConfig, QuantizationConfig

from .convolution_cases import CONVOLUTION
from .layer_cases import CORE
from .recurrent_cases import RECURRENT

CASES = CORE + CONVOLUTION + RECURRENT
# Errors expected for Gaussian weights: half a step relative to the root mean square.
MODES = {
    "int8": ("int8", 0.012),
    "int4 per channel": (Int4QuantizationConfig(block_size=None), 0.16),
    "int4 block 128": (Int4QuantizationConfig(block_size=128), 0.15),
    "int4 block 32": (Int4QuantizationConfig(block_size=32), 0.12),
    "float8": ("float8", 0.07),
    "nf4": (QuantizationConfig(NF4A16), 0.15),
}
# Those that differ from the other modes only in the matrix multiplication.
OF_MATRICES = ("int4 block 128", "nf4")
# One layer of each family, for what concerns all layers of a family alike.
FAMILIES = ("Dense", "Embedding", "Conv2D", "LSTM")
# Layers whose scales of activations and gradients lie elsewhere: several products, other axes.
IN_FLOAT8 = (*FAMILIES, "EinsumDense", "DepthwiseConv2D", "SeparableConv1D", "GRU")
IN_FLOAT8 += ("Conv2DTranspose",)


def policies(row, case, mode):
    """The policies of a case in a mode: each meets each mode and each layer, though not both."""
    if mode == "int8":
        return ("float32", "mixed_bfloat16") if case.name in FAMILIES else ("float32",)
    if mode in OF_MATRICES:
        return ("float32",) if case in CORE else ()
    if mode == "int4 per channel":
        return ("float32",) if case.name in FAMILIES else ()
    if case.name not in IN_FLOAT8:
        return () if mode == "float8" else ("mixed_bfloat16",)
    return ("float32", "mixed_bfloat16")[(row + (mode == "float8")) % 2 :][:1]


ROWS = [
    (case, mode, policy)
    for row, case in enumerate(CASES)
    for mode in MODES
    for policy in policies(row, case, mode)
]
# The modes whose files are tested: of each kind of file, one.
FILES = ["int8", "int4 block 32", "nf4"]


def relative_error(found, wanted):
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@functools.cache
def float_layer(case, policy):
    """The inputs, weights and outputs of a case, in float."""
    keras.utils.set_random_seed(0)
    inputs = case.inputs(np.random.default_rng(0), (2, *case.input_shape))
    model = build(case, policy, inputs.dtype.name)
    outputs = jax.jit(lambda x: model(x))(inputs)
    return inputs, model.get_weights(), np.asarray(outputs, np.float32)


def build(case, policy, dtype) -> Any:
    start = keras.Input(case.input_shape, dtype=dtype)
    return keras.Sequential([start, case.make(dtype=policy)])


def quantize(model, mode):
    model.quantize(mode) if isinstance(mode, str) else model.quantize(config=mode)


def configs(model):
    """How each layer within is quantized."""
    found = [x for x in model._flatten_layers() if getattr(x, "stored_weights", None)]
    return [(x.dtype_policy.name, x.quantization_config.get_config()) for x in found]


def assert_same(model, wanted):
    """The same weights and configs, from which the same outputs follow."""
    assert configs(model) == configs(wanted) != []
    for found, held in zip(model.weights, wanted.weights, strict=True):
        assert (found.name, found.dtype) == (held.name, held.dtype)
        np.testing.assert_array_equal(found, held)


@pytest.mark.parametrize(
    ("case", "mode", "policy"), ROWS, ids=lambda x: x if isinstance(x, str) else x.name
)
def test_layer_is_close_to_float_and_round_trips_through_files(case, mode, policy, tmp_path):
    inputs, weights, wanted = float_layer(case, policy)
    config, bound = MODES[mode]
    model = build(case, policy, inputs.dtype.name)
    model.set_weights(weights)
    quantize(model, config)
    found = np.asarray(model.predict(inputs, verbose=0), np.float32)
    assert 0 < relative_error(found, wanted) <= bound * case.products**0.5
    if mode in FILES:
        model.save(tmp_path / "model.keras")
        loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
        assert_same(loaded, model)
        model.save_weights(tmp_path / "model.weights.h5")
        fresh = build(case, policy, inputs.dtype.name)
        fresh.load_weights(tmp_path / "model.weights.h5")
        assert_same(fresh, model)
