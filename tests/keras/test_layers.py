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
# One layer of each family, for what concerns all layers of a family alike.
FAMILIES = ("Dense", "Embedding", "Conv2D", "LSTM")
# Convolutions of other ranks, of which tests/keras/test_convolution.py has the products of int8.
OTHER_RANKS = ("Conv1D", "Conv3D", "Conv1DTranspose", "Conv3DTranspose", "DepthwiseConv1D")
OTHER_RANKS += ("SeparableConv2D", "GRU reset before")
# Layers that meet only some modes: all meet blocks, and scales of float8 may lie elsewhere.
LAYERS = {
    "int4 per channel": ("Dense", "Conv2D"),
    "int4 block 128": ("EinsumDense",),
    "float8": (*FAMILIES, "SeparableConv1D"),
    "nf4": ("Dense", "Embedding"),
}


def policies(row, case, mode):
    """The policies of a case in a mode: each meets each mode and each layer, though not both."""
    if mode == "int8":
        both = ("float32", "mixed_bfloat16") if case.name in ("Dense", "Conv2D") else ("float32",)
        return both if case.name not in OTHER_RANKS else ()
    if mode == "int4 block 32":
        return (("float32", "mixed_bfloat16")[case.name not in FAMILIES or row % 2],)
    policy = "mixed_bfloat16" if mode == "float8" and row % 2 == 0 else "float32"
    return (policy,) if case.name in LAYERS[mode] else ()


ROWS = [
    (case, mode, policy)
    for row, case in enumerate(CASES)
    for mode in MODES
    for policy in policies(row, case, mode)
]


def has_files(case, mode):
    """Whether the files of a mode are tested: of each kind of file, and of each layer, one."""
    return mode in ("int4 block 32", "nf4") or (mode == "int8" and case.name in FAMILIES)


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


@pytest.mark.some_rows(1)
@pytest.mark.parametrize(
    ("case", "mode", "policy"), ROWS, ids=lambda x: x if isinstance(x, str) else x.name
)
def test_layer_is_close_to_float_and_round_trips_through_files(case, mode, policy, tmp_path):
    inputs, weights, wanted = float_layer(case, policy)
    config, bound = MODES[mode]
    model = build(case, policy, inputs.dtype.name)
    model.set_weights(weights)
    quantize(model, config)
    predict = model.predict_on_batch if case.name in FAMILIES else jax.jit(lambda x: model(x))
    found = np.asarray(predict(inputs), np.float32)
    assert 0 < relative_error(found, wanted) <= bound * case.products**0.5
    if has_files(case, mode):
        model.save(tmp_path / "model.keras")
        loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
        assert_same(loaded, model)
        model.save_weights(tmp_path / "model.weights.h5")
        fresh = build(case, policy, inputs.dtype.name)
        fresh.load_weights(tmp_path / "model.weights.h5")
        assert_same(fresh, model)
