"""Files saved by an earlier version, at commit c7fce14, still load."""

import pathlib
import zipfile
from typing import Any

import keras
import numpy as np
import pytest

from jaxquant import MXFP4A16, NF4A16, W4A16_ASYM, Rule
from jaxquant.keras import (
    Float8QuantizationConfig,
    Int4QuantizationConfig,
    Int8QuantizationConfig,
    QuantizationConfig,
    layers,
)

SAVED = pathlib.Path(__file__).parent / "data" / "saved_by_c7fce14.zip"
RULES = [("table/*", NF4A16), Rule("dense/*", W4A16_ASYM, group_size=8), ("last/*", MXFP4A16)]
# How the saved models were quantized. "training" was fitted for two steps.
CONFIGS: dict[str, Any] = {
    "int8": Int8QuantizationConfig(),
    "int4": Int4QuantizationConfig(block_size=8),
    "float8": Float8QuantizationConfig(),
    "training": Float8QuantizationConfig(training=True),
    "preset": QuantizationConfig(RULES),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    with zipfile.ZipFile(SAVED) as archive:
        archive.extractall(path)
    return path


def float_model(kind) -> Any:
    x = keras.Input((6,), dtype="int32", name="tokens")
    y = layers.Embedding(11, 16, name="table")(x)
    y = layers.Dense(8, activation="tanh", name="dense")(y)
    if kind != "training":
        y = layers.Conv1D(4, 3, name="conv")(y)
    y = keras.layers.LayerNormalization(name="norm")(y)
    return keras.Model(x, layers.Dense(3, name="last")(y), name=kind)


def check_outputs(model, kind, folder):
    with np.load(folder / "outputs.npz") as outputs:
        wanted = outputs[kind]
    tokens = np.arange(12).reshape(2, 6) * 5 % 11
    # Up to rounding differences between platforms.
    np.testing.assert_allclose(model(tokens), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("kind", CONFIGS)
def test_models_saved_by_earlier_versions_give_the_same_outputs(kind, folder):
    model: Any = keras.saving.load_model(folder / f"{kind}.keras", compile=False)
    check_outputs(model, kind, folder)
    config, wanted = model.get_layer("dense").quantization_config, CONFIGS[kind]
    assert type(config) is type(wanted)
    if kind != "preset":  # With a preset, each layer keeps only the rules of its own weights.
        assert config.get_config() == wanted.get_config()


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_saved_by_earlier_versions_give_the_same_outputs(kind, folder):
    model = float_model(kind)
    model.load_weights(folder / f"{kind}.weights.h5")
    check_outputs(model, kind, folder)
