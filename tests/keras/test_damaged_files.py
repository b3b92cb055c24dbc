"""Damaged weight files: no wrong value is loaded, and a failed call changes nothing."""

import functools
import io
import shutil
import warnings
import zipfile
from typing import Any

import h5py
import keras
import numpy as np
import pytest

from jaxquant import NF4A16, W8A8
from jaxquant.keras import QuantizationConfig, layers, load_weights
from jaxquant.keras.compat import sublayers

RULES = {"table/*": NF4A16, "first/*": W8A8, "last/*": None}
PATHS = ("layers/embedding", "layers/dense", "layers/layer_normalization", "layers/dense_1")


def model_of(seed, is_quantized) -> Any:
    keras.utils.set_random_seed(seed)
    x = keras.Input((3,), dtype="int32")
    y = layers.Embedding(9, 64, name="table", embeddings_initializer="normal")(x)
    y = layers.Dense(5, bias_initializer="normal", name="first")(y)
    y = keras.layers.LayerNormalization(name="norm")(y)
    model: Any = keras.Model(x, layers.Dense(2, bias_initializer="normal", name="last")(y))
    model.get_layer("norm").gamma.assign(np.arange(1, 6) + seed)
    if is_quantized:
        model.quantize(config=QuantizationConfig(RULES))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file of a quantized model, and its values by layer."""
    path = tmp_path_factory.mktemp("saved") / "model.weights.h5"
    model = model_of(0, is_quantized=True)
    model.save_weights(path)
    return path, state_of(model)


@functools.cache
def target(is_quantized):
    """A model to load into; it is replaced after a successful load."""
    return model_of(1, is_quantized)


def state_of(model):
    """By layer: its policy, and the names and values of its variables in order."""
    return {
        layer.name: (
            layer.dtype_policy.name,
            [(v.name, v.trainable, np.asarray(v).tolist()) for v in layer.weights],
        )
        for layer in sublayers(model)
        if layer.weights and layer is not model
    }


def load(function, model, path):
    """Whether the call succeeded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy warns about some damaged values.
        try:
            function(model, path)
        except Exception:
            return False
    return True


def remove(file, path, key):
    del file[f"{path}/vars/{key}"]


def replace(make):
    def damage(file, path, key):
        group = file[f"{path}/vars"]
        value = make(np.asarray(group[key]))
        del group[key]
        group[key] = value

    return damage


def add(file, path, key):
    file[f"{path}/vars/extra{key}"] = np.ones(3)


def remove_layer(file, path, key):
    del file[path]


def swap(file, path, key):
    other = PATHS[PATHS.index(path) - 1]
    file.move(path, "swapped")
    file.move(other, path)
    file.move("swapped", other)


def flip(x):
    x = x.copy()
    x.view(np.uint8).flat[x.nbytes // 2] ^= 5
    return x


DAMAGES: dict[str, Any] = {
    "no entry": remove,
    "another shape": replace(lambda x: np.concatenate([x.ravel(), x.ravel()])),
    "another dtype": replace(lambda x: x.astype(np.float16 if x.dtype != "f2" else np.float64)),
    "text": replace(lambda x: np.full(x.shape, b"ab")),
    "NaN": replace(lambda x: np.full(x.shape, np.nan, np.float32)),
    "an altered byte": replace(lambda x: flip(np.atleast_1d(x)).reshape(x.shape)),
    "one more entry": add,
    "no layer": remove_layer,
    "layers swapped": swap,
}
# Damage that does not affect the values of `norm`, a stock layer without checksums.
UNSEEN_IN_STOCK = ("another dtype", "NaN", "an altered byte")


def damaged(saved_path, path, damage, key):
    shutil.copy(saved_path, path)
    with h5py.File(path, "r+") as file:
        DAMAGES[damage](file, PATHS[key[0]], str(key[1]))


@pytest.mark.some_rows(3)
@pytest.mark.parametrize(
    ("damage", "is_quantized"),
    [*((d, False) for d in DAMAGES), *((d, True) for d in ("no entry", "an altered byte"))],
)
def test_load_weights_of_a_damaged_file_changes_nothing(damage, is_quantized, saved, tmp_path):
    path, model = tmp_path / "model.weights.h5", target(is_quantized)
    before = state_of(model)
    for key in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (3, 0)]:
        if key[0] == 2 and damage in UNSEEN_IN_STOCK:
            continue
        damaged(saved[0], path, damage, key)
        assert not load(load_weights, model, path), key
        assert state_of(model) == before, key
    assert model(np.ones((1, 3))).shape == (1, 3, 2)


@pytest.mark.parametrize("is_quantized", [False, True], ids=["float", "quantized"])
def test_keras_loads_no_layer_partially(is_quantized, saved, tmp_path):
    path = tmp_path / "model.weights.h5"
    for damage in ("no entry", "another shape", "text", "an altered byte"):
        model = model_of(1, is_quantized)
        before = state_of(model)
        damaged(saved[0], path, damage, (1, 1))
        assert not load(keras.Model.load_weights, model, path)
        after = state_of(model)
        assert after["first"] == before["first"], damage
        for name in ("table", "norm", "last"):
            assert after[name] == saved[1][name], "Keras goes on after an error"


@pytest.mark.slow
@pytest.mark.parametrize("is_quantized", [False, True], ids=["float", "quantized"])
def test_no_altered_byte_of_a_quantizable_layer_is_loaded_silently(is_quantized, saved, tmp_path):
    path, model = tmp_path / "model.weights.h5", target(is_quantized)
    before, content = state_of(model), saved[0].read_bytes()
    rng, loaded = np.random.default_rng(0), 0
    for place in rng.integers(0, len(content), 30):
        path.write_bytes(content[:place] + bytes([content[place] ^ 36]) + content[place + 1 :])
        if load(load_weights, model, path):
            found = state_of(model)
            loaded += 1
            for name in ("table", "first", "last"):
                assert found[name] == saved[1][name], place
            model = model_of(1, is_quantized)
        else:
            assert state_of(model) == before, place
    assert loaded, "a byte that stands for nothing"


@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_every_altered_code_is_found_and_the_layer_is_named(saved, tmp_path):
    path, model = tmp_path / "model.weights.h5", target(True)
    for index, text in [
        (0, "entries ['0'] of layer 'table'"),
        (3, "entries ['0'] of layer 'last'"),
    ]:
        damaged(saved[0], path, "an altered byte", (index, 0))
        with pytest.raises(ValueError, match="do not have the checksums") as error:
            load_weights(model, path)
        assert text in str(error.value)
    shutil.copy(saved[0], path)
    with h5py.File(path, "r+") as file:
        file["layers/dense/vars"].attrs["crc32"] = "{nonsense"
    with pytest.raises(
        ValueError, match="attribute 'crc32' of layer 'first' must be a JSON object"
    ):
        load_weights(model, path)


def test_files_without_checksums_load(saved, tmp_path):
    path, model = tmp_path / "model.weights.h5", model_of(1, is_quantized=False)
    shutil.copy(saved[0], path)
    with h5py.File(path, "r+") as file:
        for layer in PATHS:
            file[f"{layer}/vars"].attrs.pop("crc32", None)
    load_weights(model, path)
    assert state_of(model) == saved[1]


@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_a_keras_file_with_an_altered_code_is_not_loaded(tmp_path):
    path, model = tmp_path / "model.keras", model_of(0, is_quantized=True)
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    weights = io.BytesIO(parts["model.weights.h5"])
    with h5py.File(weights, "r+") as file:
        DAMAGES["an altered byte"](file, PATHS[0], "0")
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (parts | {"model.weights.h5": weights.getvalue()}).items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"entries \['0'\] of layer 'table'"):
        keras.saving.load_model(path)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"entries \['0'\] of layer 'table'"):
        load_weights(model, path)
    assert state_of(model) == before


def test_load_weights_restores_the_optimizer_and_trains_on(saved, tmp_path):
    path, model = tmp_path / "model.weights.h5", model_of(1, is_quantized=False)
    x, y = np.ones((4, 3), np.int32), np.ones((4, 3, 2))
    model.compile("adam", loss="mse")
    model.fit(x, y, verbose=0)
    before = state_of(model), [np.array(v) for v in model.optimizer.variables]
    damaged(saved[0], path, "an altered byte", (3, 0))
    assert not load(load_weights, model, path)
    assert state_of(model) == before[0]
    for found, wanted in zip(model.optimizer.variables, before[1], strict=True):
        np.testing.assert_array_equal(found, wanted)
    model.fit(x, y, verbose=0)
    assert state_of(model)["last"] != before[0]["last"]
