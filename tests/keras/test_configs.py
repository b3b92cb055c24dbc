"""Configs: their meaning, their errors, and that files keep them."""

import json
from typing import Any

import keras
import numpy as np
import pytest

from jaxquant import (
    FP8,
    INT4,
    INT8,
    MXFP4A16,
    NF4,
    NF4A16,
    NVFP4A16,
    SCHEMES,
    W4A8,
    W4A16,
    W8A8,
    W8A16,
    AbsMax,
    ArrayConfig,
    MinMSE,
    Percentile,
    Rule,
    Scheme,
    quantize,
)
from jaxquant.keras import (
    AbsMaxQuantizer,
    Float8QuantizationConfig,
    Int4QuantizationConfig,
    Int8QuantizationConfig,
    PercentileQuantizer,
    QuantizationConfig,
    layers,
)
from jaxquant.keras.configs import as_config

from .test_layers import relative_error

INT4_RANGE: Any = {"value_range": (-8, 7)}
# Name of each config, and the relative error that follows from its format.
CONFIGS = {
    "int8": (lambda: Int8QuantizationConfig(), 0.015),
    "int8 quantizers": (
        lambda: Int8QuantizationConfig(
            AbsMaxQuantizer(value_range=(-100, 100)), PercentileQuantizer(99.5)
        ),
        0.1,
    ),
    "int8 weights only": (lambda: Int8QuantizationConfig(None, None), 0.01),
    "int4": (lambda: Int4QuantizationConfig(), 0.15),
    "int4 per channel": (lambda: Int4QuantizationConfig(block_size=None), 0.18),
    "int4 per channel -1": (lambda: Int4QuantizationConfig(block_size=-1), 0.18),
    "int4 block 32": (lambda: Int4QuantizationConfig(block_size=32), 0.12),
    "int4 quantizers": (
        lambda: Int4QuantizationConfig(
            AbsMaxQuantizer(**INT4_RANGE), AbsMaxQuantizer(), block_size=32
        ),
        0.13,
    ),
    "int4 activations": (
        lambda: Int4QuantizationConfig(None, AbsMaxQuantizer(), block_size=None),
        0.18,
    ),
    "float8": (lambda: Float8QuantizationConfig(), 0.06),
    **{
        name: (lambda name=name: QuantizationConfig(SCHEMES[name]), bound)
        for name, bound in {
            "W8A8": 0.015,
            "W8A16": 0.01,
            "W4A16": 0.15,
            "W4A16_ASYM": 0.15,
            "W4A8": 0.15,
            "FP8": 0.06,
            "NF4A16": 0.12,
            "MXFP8A8": 0.08,
            "MXFP4A16": 0.2,
            "NVFP4A16": 0.15,
        }.items()
    },
    "percentile": (lambda: QuantizationConfig(ArrayConfig(range=Percentile(99.0))), 0.1),
    "least squares": (lambda: QuantizationConfig(ArrayConfig(format=INT4, range=MinMSE())), 0.15),
    "asymmetric groups": (
        lambda: QuantizationConfig(ArrayConfig(format=INT4, group_size=16, symmetric=False)),
        0.1,
    ),
    "small scales": (
        lambda: QuantizationConfig(ArrayConfig(group_size=32, scale_dtype="bfloat16")),
        0.02,
    ),
    "per tensor": (lambda: QuantizationConfig(ArrayConfig(per_tensor=True)), 0.02),
}
# Written in another way, they are another config here.
SAME = {"int4 per channel -1", "W8A8", "W8A16", "W4A16", "FP8"}
# Run by test_layers.py, or alike in everything but a range or a quantizer that others have.
RUN_ELSEWHERE = {
    "int4 per channel",
    "int4 block 32",
    "int4 activations",
    "W4A16_ASYM",
    "percentile",
    "least squares",
}
# Files hold the same as those of another config, which other tests say survives serialization.
STORED_ALIKE = {
    "int8 weights only",
    "int4 quantizers",
}


def make_model(seed=0, policy="float32", width=96):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((5, width)),
            layers.EinsumDense(
                "abc,cde->abde", (5, 4, 8), bias_axes="de", bias_initializer="normal", name="heads"
            ),
            layers.EinsumDense("abde,def->abf", (5, 64), name="join"),
            layers.Dense(33, activation="gelu", name="hidden"),
            layers.Dense(7, bias_initializer="normal", name="head"),
        ]
    )


def some_inputs():
    return np.random.default_rng(1).normal(size=(3, 5, 96)).astype(np.float32)


def comes_back(config):
    """The config after Keras' serialization and JSON."""
    text = json.dumps(keras.saving.serialize_keras_object(config))
    return keras.saving.deserialize_keras_object(json.loads(text))


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_serialization(name):
    config = CONFIGS[name][0]()
    found = comes_back(config)
    assert type(found) is type(config)
    assert (found.mode, found.get_config()) == (config.mode, config.get_config())
    assert found.rule_for("a/kernel").resolve() == config.rule_for("a/kernel").resolve()
    assert Float8QuantizationConfig.from_config({"training": True}).is_training


@pytest.mark.slow
@pytest.mark.some_rows(3)
@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in SAME | RUN_ELSEWHERE])
def test_a_dense_layer_runs_with_each_config_and_round_trips_through_files(name, tmp_path):
    make_config, bound = CONFIGS[name]
    keras.utils.set_random_seed(0)
    dense = layers.Dense(33, bias_initializer="normal")
    model = keras.Sequential([keras.Input((96,)), dense])
    inputs = some_inputs()[:, 0]
    wanted = np.asarray(model(inputs))
    model.quantize(config=make_config())
    found = np.asarray(model(inputs))

    assert 0 < relative_error(found, wanted) < bound
    assert dense.dtype_policy.name == f"{make_config().mode}_from_float32"
    if name in STORED_ALIKE:
        return
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(inputs), found)
    kept = loaded.layers[0].quantization_config
    assert type(kept) is type(dense.quantization_config)
    assert kept.get_config() == dense.quantization_config.get_config()


MIXED = {
    "*heads/kernel": NF4A16,
    "*join/*": None,
    "re:.*hid+en/kernel": W4A8,
    "*": Scheme(ArrayConfig(range=Percentile(99.9)), ArrayConfig(range=MinMSE())),
}


@pytest.mark.slow
def test_the_first_rule_that_matches_the_path_applies(tmp_path):
    model, inputs = make_model(), some_inputs()
    wanted = np.asarray(model(inputs))
    kernels = {layer.name: np.asarray(layer.kernel) for layer in model.layers}
    model.quantize(config=QuantizationConfig(MIXED))

    modes = [layer.quantization_mode for layer in model.layers]
    assert modes == ["int4", None, "int4", "int8"]
    heads, join, hidden, head = model.layers
    assert heads.quantized_weight("kernel").format is NF4
    np.testing.assert_array_equal(join.kernel, kernels["join"])
    assert join.trainable_weights == [join.kernel]
    assert hidden.quantized_weight("kernel").inputs.config.format is INT8
    expected = quantize(kernels["head"], MIXED["*"].weights).dequantize()
    np.testing.assert_array_equal(head.kernel, expected)
    assert head.quantized_weight("kernel").inputs.config.range == MinMSE()

    found = np.asarray(model(inputs))
    assert 0 < relative_error(found, wanted) < 0.2
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(inputs), found)
    assert [layer.quantization_mode for layer in loaded.layers] == modes
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = make_model(seed=1)
    fresh.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(fresh(inputs), found)


def test_a_layer_that_no_rule_matches_stays_float(tmp_path):
    model, inputs = make_model(), some_inputs()
    model.quantize(config=QuantizationConfig([Rule("*/head/*", W8A16, group_size=11)]))
    assert [layer.quantization_mode for layer in model.layers] == [None, None, None, "int8"]
    assert model.layers[3].quantized_weight("kernel").reorder(None).scale.shape == (3, 7)
    assert model.layers[0].quantization_config is None
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(inputs), model(inputs))


def test_a_rule_may_name_the_axis():
    layer: Any = layers.Dense(3)
    layer.build((None, 8))
    layer.quantize(config=QuantizationConfig([Rule("*", W8A16, axis=1)]))
    assert layer.quantized_weight("kernel").reorder(None).scale.shape == (8, 1)


@pytest.mark.some_rows(1)
@pytest.mark.parametrize(
    "block_size, groups", [(128, 1), (96, 1), (40, 3), (1, 96), (None, 1), (-1, 1)]
)
def test_block_size_is_the_group_size(block_size, groups):
    layer: Any = layers.Dense(3)
    layer.build((None, 96))
    layer.quantize(config=Int4QuantizationConfig(block_size=block_size))
    q = layer.quantized_weight("kernel").reorder(None)
    assert q.scale.shape == (groups, 3)
    assert (q.zero_point is None) == (block_size in (None, -1))


def test_quantizers_apply_to_weights_and_inputs():
    config = Int4QuantizationConfig(
        AbsMaxQuantizer(value_range=(-5, 5)),
        PercentileQuantizer(99.0, value_range=(-50, 50)),
        block_size=None,
    )
    layer: Any = layers.Dense(3)
    layer.build((None, 96))
    layer.quantize(config=config)
    q = layer.quantized_weight("kernel")
    assert np.abs(np.asarray(q.codes, np.int8)).max() == 5
    inputs = q.inputs.config
    assert (inputs.format, inputs.range, inputs.value_range) == (INT8, Percentile(99.0), (-50, 50))
    assert layer.inputs_quantizer is config.activation_quantizer


stock: Any = keras.quantizers
WRONG_BLOCK_SIZES: Any = (0, -2, 1.5, True, "128")


@pytest.mark.parametrize(
    "given, wanted",
    [
        (stock.Int8QuantizationConfig(), Int8QuantizationConfig()),
        (stock.Int4QuantizationConfig(), Int4QuantizationConfig()),
        (stock.Float8QuantizationConfig(), Float8QuantizationConfig()),
        (
            stock.Int8QuantizationConfig(AbsMaxQuantizer(), None),
            Int8QuantizationConfig(AbsMaxQuantizer(), None),
        ),
    ],
)
def test_stock_configs_convert_to_jaxquant_configs(given, wanted):
    found = as_config(None, given)
    assert type(found) is type(wanted)
    assert found.get_config() == wanted.get_config()
    assert as_config(given.mode, None).mode == as_config(None, given.mode).mode == given.mode


def test_a_subclass_of_a_stock_config_converts_too():
    class Restricted(stock.Int8QuantizationConfig):
        def __init__(self, limit):
            super().__init__(AbsMaxQuantizer(value_range=(-limit, limit)), None)

    layer: Any = layers.Dense(3)
    layer.build((None, 96))
    layer.quantize(config=Restricted(30))
    assert np.abs(np.asarray(layer.quantized_weight("kernel").codes)).max() == 30


def test_the_mode_follows_from_the_first_scheme():
    modes = {W8A8: "int8", NF4A16: "int4", MXFP4A16: "int4", NVFP4A16: "int4", FP8: "float8"}
    assert {scheme: QuantizationConfig(scheme).mode for scheme in modes} == modes
    assert QuantizationConfig({"a": None, "b": W4A16, "c": W8A8}).mode == "int4"
    assert QuantizationConfig({"a": None}).mode == "int8"


# What serializing `jk.Config(ArrayConfig(axis=-2))` gave under the config's earlier name.
EARLIER = {
    "module": "jaxquant.keras.configs",
    "class_name": "Config",
    "registered_name": "jaxquant>Config",
    "config": {
        "rules": [
            {
                "pattern": "*",
                "scheme": {
                    "weights": {
                        "format": {
                            "name": "int8",
                            "dtype": "int8",
                            "qmin": -127,
                            "qmax": 127,
                            "codebook": None,
                            "group_size": None,
                            "scale_dtype": "float32",
                            "power": None,
                        },
                        "axis": -2,
                        "group_size": None,
                        "symmetric": True,
                        "range": {"name": "AbsMax"},
                        "value_range": None,
                        "scale_dtype": None,
                    },
                    "inputs": None,
                },
                "axis": None,
                "group_size": None,
                "required": True,
                "note": None,
            }
        ]
    },
}


def test_configs_saved_under_the_earlier_name_load():
    found: Any = keras.saving.deserialize_keras_object(EARLIER)
    assert isinstance(found, QuantizationConfig)
    rule: Any = found.rules[0]
    assert len(found.rules) == 1
    serialized: Any = keras.saving.serialize_keras_object(found)
    assert (rule.pattern, rule.scheme.weights.format, rule.scheme.inputs) == ("*", INT8, None)
    assert serialized["registered_name"] == "jaxquant>Config"


class OwnRange(AbsMax):
    """Not named in RANGES."""


@pytest.mark.parametrize(
    "make, wanted",
    [
        *[
            (lambda b=b: Int4QuantizationConfig(block_size=b), rf"block_size must .*; got {b!r}\.")
            for b in WRONG_BLOCK_SIZES
        ],
        (
            lambda: Int8QuantizationConfig(activation_quantizer="defualt"),
            r"activation_quantizer must be a quantizer, 'default' or None; got 'defualt'",
        ),
        (
            lambda: Int4QuantizationConfig(activation_quantizer="abs-max"),
            r"activation_quantizer must be a quantizer, 'default' or None; got 'abs-max'",
        ),
        (
            lambda: Int8QuantizationConfig("default"),
            r"A quantizer must be a keras\.quantizers\.Quantizer; got 'default'",
        ),
        (
            lambda: Int4QuantizationConfig(AbsMaxQuantizer()),
            r"within \[-8, 7\] for int4; got \(-127, 127\)",
        ),
        (lambda: QuantizationConfig({}), r"rules must not be empty; got {}"),
        (
            lambda: QuantizationConfig("NF4A16"),
            r"got 'NF4A16'; write jaxquant\.SCHEMES\['NF4A16'\]",
        ),
        (
            lambda: QuantizationConfig({"*": "NF4A16"}),
            r"got 'NF4A16'; write jaxquant\.SCHEMES\['NF4A16'\]",
        ),
        (
            lambda: QuantizationConfig({"*": Int8QuantizationConfig()}),
            r"scheme must be a Scheme, an Array",
        ),
        (
            lambda: QuantizationConfig([Rule("a*", W8A8, where=lambda path, leaf: True)]),
            r"must go by path alone; got a `where` in \['a\*'\]",
        ),
        (
            lambda: QuantizationConfig(ArrayConfig(range=OwnRange())),
            r"Only configs with the ranges AbsMax, .*; got OwnRange\(\)",
        ),
    ],
)
def test_arguments_are_checked(make, wanted):
    with pytest.raises(ValueError, match=wanted):
        make()


def test_an_invalid_axis_raises_before_anything_changes():
    layer: Any = layers.Dense(3)
    layer.build((None, 8))
    with pytest.raises(ValueError, match=r"axis must lie in -2 \.\. 1 .*; got axis=\(5,\)"):
        layer.quantize(config=QuantizationConfig([Rule("*", W8A16, axis=5)]))
    with pytest.raises(ValueError, match=r"group_size must divide axis 0; got group_size=3"):
        layer.quantize(config=QuantizationConfig(ArrayConfig(group_size=(3,))))
    assert layer.quantization_mode is None
    assert len(layer.trainable_weights) == 2
