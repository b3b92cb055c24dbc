"""Names and types of Keras that users' code relies on."""

from typing import Any

import jax.numpy as jnp
import keras
import numpy as np
import pytest

import jaxquant as jq
import jaxquant.keras as jk

from .test_guides import HandWrittenScale

stock = keras.layers
X = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)


def model_of(layer, shape=(64,), dtype="float32") -> Any:
    return keras.Sequential([keras.Input(shape, dtype=dtype), layer])


@pytest.mark.parametrize("name", ["Int8", "Int4", "Float8"])
def test_configs_are_instances_of_those_of_keras(name):
    kind = getattr(keras.quantizers, f"{name}QuantizationConfig")
    config: Any = getattr(jk, f"{name}QuantizationConfig")()
    assert isinstance(config, kind)
    assert config.mode == kind().mode
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(config))
    assert type(again) is type(config)
    assert again.get_config() == config.get_config()
    model = model_of(jk.layers.Dense(3))
    model.quantize(config=config)
    assert model.layers[0].quantization_config.get_config() == config.get_config()


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize(
    "make, weight, shape, dtype",
    [
        (lambda m: m.Dense(3), "kernel", (64,), "float32"),
        (lambda m: m.EinsumDense("abc,cde->adbe", (5, 6, 4)), "kernel", (6, 64), "float32"),
        (lambda m: m.Embedding(11, 64), "embeddings", (6,), "int32"),
    ],
    ids=["Dense", "EinsumDense", "Embedding"],
)
def test_scales_per_channel_are_those_of_keras(make, weight, shape, dtype, mode):
    arguments: dict[str, Any] = {"mode": mode}
    if mode == "int4":
        if not hasattr(keras.quantizers, "AWQConfig"):
            pytest.skip("Keras 3.13 packs another axis")
        config: Any = keras.quantizers.Int4QuantizationConfig
        arguments["config"] = config(block_size=None)
    keras.utils.set_random_seed(0)
    ours, theirs = (model_of(make(m), shape, dtype) for m in (jk.layers, stock))
    theirs.set_weights(ours.get_weights())
    for model in (ours, theirs):
        model.quantize(**arguments)
    found, wanted = (getattr(m.layers[0], f"{weight}_scale") for m in (ours, theirs))
    assert found.shape == tuple(wanted.shape)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_scales_and_zero_points_of_groups():
    layer: Any = jk.layers.Dense(3)
    layer.build((None, 64))
    layer.quantize(config=jk.Int4QuantizationConfig(block_size=16))
    assert layer.kernel_scale.shape == layer.kernel_zero.shape == (4, 3)
    q = layer.quantized_weight("kernel").reorder(None)
    codes, scale, zero = (
        np.asarray(x, np.float32) for x in (q.codes, layer.kernel_scale, layer.kernel_zero)
    )
    values = (codes - np.repeat(zero, 16, 0)) * np.repeat(scale, 16, 0)
    np.testing.assert_allclose(values, layer.kernel, rtol=1e-6)

    codebook: Any = jk.layers.Dense(3)
    codebook.build((None, 64))
    codebook.quantize(config=jk.QuantizationConfig(jq.NF4A16))
    np.testing.assert_array_equal(
        codebook.kernel_scale, codebook.quantized_weight("kernel").reorder(None).scale
    )


def test_scales_are_read_only_and_only_where_there_are_some():
    layer: Any = jk.layers.Dense(3)
    layer.build((None, 64))
    for name in ("kernel_scale", "kernel_zero", "bias_scale", "nothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(layer, name)
    layer.quantize("int8")
    for name in ("kernel_zero", "bias_scale", "kernel_scales"):
        with pytest.raises(AttributeError, match=name):
            getattr(layer, name)
    assert isinstance(layer.kernel_scale, jnp.ndarray)
    with pytest.raises(AttributeError, match="assign"):
        layer.kernel_scale.assign(0)  # pyright: ignore[reportAttributeAccessIssue] (on purpose)
    with pytest.raises(AttributeError, match="kernel_scale is a read-only view of the quantized"):
        layer.kernel_scale = 1.0


class OwnScale(jk.layers.Dense):
    """Creates a variable under the name of the view, as a build hook may."""

    def _int8_build(self, shape, name=None):
        super()._int8_build(shape)
        self.kernel_scale = self.add_weight(name="kernel_scale", shape=())


def test_a_build_hook_keeps_its_own_scale():
    layer: Any = OwnScale(3)
    layer.build((None, 64))
    layer.quantize("int8")
    assert isinstance(layer.kernel_scale, keras.Variable)


class HalfRange(jk.Quantizer):
    """Not registered."""

    @property
    def range(self):
        return jq.Percentile(75.0)


def test_custom_objects_reach_quantizers(tmp_path):
    model = model_of(jk.layers.Dense(3, name="dense"))
    model.quantize(config=jk.Int8QuantizationConfig(HalfRange()))
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(
        tmp_path / "model.keras", custom_objects={"HalfRange": HalfRange}
    )
    np.testing.assert_array_equal(loaded(X), model(X))
    assert type(loaded.layers[0].quantization_config.weight_quantizer) is HalfRange

    model.save_weights(tmp_path / "model.weights.h5")
    floats = model_of(jk.layers.Dense(3, name="dense"))
    text = r"'dense' cannot be made; got the classes \['Int8.*', 'HalfRange'.*CustomObjectScope"
    with pytest.raises(ValueError, match=text):
        floats.load_weights(tmp_path / "model.weights.h5")
    with keras.saving.CustomObjectScope({"HalfRange": HalfRange}):
        floats.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(floats(X), model(X))


class Mixed(jk.QuantizableMixin, HandWrittenScale):
    """The mixin over the complete class of the guide, which keeps the kernel as `_kernel`."""

    kernel = jk.QuantizedWeight(axis=0)


def test_the_mixin_over_the_class_of_the_guide(tmp_path):
    keras.utils.set_random_seed(0)
    model = model_of(Mixed())
    wanted = np.asarray(model(X))
    model.quantize("int8")
    error = np.linalg.norm(model(X) - wanted) / np.linalg.norm(wanted)
    assert 0 < error < 0.01
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras", custom_objects={"Mixed": Mixed})
    np.testing.assert_array_equal(loaded(X), model(X))
