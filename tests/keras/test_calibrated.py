"""Models quantized by methods that see their activations, such as GPTQ and AWQ."""

from typing import Any

import keras
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import methods
from jaxquant.keras import convert, functional, layers, quantize, to_stock
from jaxquant.keras.models.stock_methods import calibration_of

from .test_lifted import Experts
from .test_models import relative_error, schemes

INT4_G16 = jq.ArrayConfig(format=jq.INT4, group_size=16)


def model_of_every_kind() -> Any:
    keras.utils.set_random_seed(0)
    tokens = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(40, 32, name="table")(tokens)
    x = keras.layers.MultiHeadAttention(2, 16, name="attention")(x, x)
    x = keras.layers.Dense(48, activation="relu", name="hidden")(x)
    x = keras.layers.EinsumDense("btd,df->btf", (None, 32), name="einsum")(x)
    return keras.Model(tokens, keras.layers.Dense(16, name="head")(x), name="kinds")


def batches(count=4):
    rng = np.random.default_rng(0)
    # Some tokens are much more frequent, so that activations are correlated.
    return [np.minimum(rng.geometric(0.2, (16, 6)), 40) - 1 for _ in range(count)]


METHODS = {
    "GPTQ": methods.GPTQ(),
    "act-order": methods.GPTQ(act_order=True),
    "AWQ": methods.AWQ(),
    "AWQ and GPTQ": [methods.AWQ(), methods.GPTQ()],
}


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("name", METHODS)
def test_methods_reduce_the_error_and_files_load(name, tmp_path):
    model, *data = model_of_every_kind(), *batches()
    test = batches(5)[-1]
    exact = np.asarray(model(test))
    nearest, _ = quantize(model, INT4_G16)
    quantized, report = quantize(model, INT4_G16, method=METHODS[name], batches=data)
    found = np.asarray(quantized(test))
    assert relative_error(found, exact) < 0.95 * relative_error(np.asarray(nearest(test)), exact)

    # The same codes as those of the tree, and the table is rounded to nearest.
    apply, params = functional(model)
    key = ("kinds", "hidden") if "kinds" in params else ("hidden",)
    rule = jq.Rule("*hidden/kernel", INT4_G16, axis=0)
    statistics = jq.collect(apply, params, data, [rule], METHODS[name])
    wanted = jq.tree.quantize(params, [rule], method=METHODS[name], statistics=statistics)
    for part in key:
        wanted = wanted[part]
    q = quantized.get_layer("hidden").quantized_weight("kernel")
    np.testing.assert_array_equal(q.codes, wanted["kernel"].codes)
    np.testing.assert_array_equal(
        quantized.get_layer("table").quantized_weight("embeddings").codes,
        nearest.get_layer("table").quantized_weight("embeddings").codes,
    )
    kernel = np.asarray(model.get_layer("hidden").kernel)
    error = relative_error(np.asarray(quantized.get_layer("hidden").kernel), kernel)
    row = next(row for row in report.rows if row.path == "hidden/kernel")
    assert row.sqnr == pytest.approx(-20 * np.log10(error), abs=0.01)

    quantized.save(tmp_path / "model.keras")
    quantized.save_weights(tmp_path / "model.weights.h5")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    fresh = convert(model)
    fresh.load_weights(tmp_path / "model.weights.h5")
    for other in (loaded, fresh, convert(quantized)):
        np.testing.assert_array_equal(other(test), found)


def test_the_multiplier_of_awq_is_part_of_the_weight():
    data, test = batches(), batches(5)[-1]
    quantized, _ = quantize(
        model_of_every_kind(), jq.W4A16_ASYM, method=methods.AWQ(), batches=data
    )
    dense: Any = quantized.get_layer("hidden")
    assert [v.name for v in dense.variables][-1] == "kernel_multiplier"
    with pytest.raises(ValueError, match="activations have a multiplier, which a method chose"):
        dense.enable_lora(2)
    with pytest.raises(ValueError, match="Keras does not have the mode"):
        to_stock(quantized)
    stock = to_stock(quantized, dequantize=True)
    assert relative_error(np.asarray(stock(test)), np.asarray(quantized(test))) < 1e-4


def test_rules_name_methods():
    rules = [
        jq.Rule("head/*", jq.W8A8),
        jq.Rule("hidden/*", INT4_G16, method=methods.GPTQ()),
        jq.Rule("*", None),
    ]
    model = model_of_every_kind()
    quantized, report = quantize(model, rules, batches=batches())
    found = {path: scheme for path, scheme in schemes(report).items() if "int" in str(scheme)}
    assert found == {
        "hidden/kernel": "int4 g16",
        "head/kernel": "int8 per channel, int8 inputs",
    }
    nearest, _ = quantize(model, {"hidden/*": INT4_G16, "head/*": jq.W8A8})
    codes = [
        {name: np.asarray(x.get_layer(name).quantized_weight("kernel").codes) for name in NAMES}
        for x in (quantized, nearest)
    ]
    assert np.any(codes[0]["hidden"] != codes[1]["hidden"])
    np.testing.assert_array_equal(codes[0]["head"], codes[1]["head"])


NAMES = ("hidden", "head")


def test_experts_get_error_feedback():
    keras.utils.set_random_seed(0)
    start = keras.Input((6, 16))
    model = keras.Model(start, Experts(name="bank")(start))
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(16, 16)) * np.exp(rng.normal(size=16))
    x = [(rng.normal(size=(32, 6, 16)) @ mix).astype(np.float32) for _ in range(3)]
    exact = np.asarray(model(x[0]))
    errors = []
    for method in (methods.Nearest(), methods.GPTQ()):
        quantized, _ = quantize(model, jq.ArrayConfig(format=jq.INT4), method=method, batches=x)
        errors.append(relative_error(np.asarray(quantized(x[0])), exact))
    assert errors[1] < 0.9 * errors[0]
    # Without statistics, each matrix gets its own.
    with pytest.raises(ValueError, match="Matrices of a stack must have one multiplier in common"):
        quantize(model, jq.ArrayConfig(format=jq.INT4, group_size=8), method=methods.SINQ())


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("method", [methods.AWQ(), [methods.AWQ(), methods.GPTQ()]])
def test_experts_have_one_multiplier_in_common(method, tmp_path):
    keras.utils.set_random_seed(0)
    start = keras.Input((6, 16))
    model = keras.Model(start, Experts(name="bank")(start))
    # A few channels are much larger than others.
    x = np.random.default_rng(0).normal(size=(3, 32, 6, 16)).astype(np.float32)
    x[..., 3:5] *= 20
    exact, int4 = np.asarray(model(x[0])), jq.ArrayConfig(format=jq.INT4)
    nearest, _ = quantize(model, int4)
    quantized, _ = quantize(model, int4, method=method, batches=list(x))
    found = np.asarray(quantized(x[0]))
    errors = [relative_error(y, exact) for y in (np.asarray(nearest(x[0])), found)]
    assert errors[1] < 0.8 * errors[0]
    bank: Any = quantized.get_layer("bank")
    q = bank.quantized_weight("up")
    assert q.inputs.multiplier.shape == (16,)
    assert np.ptp(np.asarray(q.inputs.multiplier)) > 0
    quantized.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x[0]), found)


def test_heads_have_one_multiplier_in_common():
    keras.utils.set_random_seed(0)
    start = keras.Input((6, 3, 16))
    product = keras.layers.EinsumDense("bthd,hde->bthe", (None, 3, 8), name="heads")
    model = keras.Model(start, product(start))
    x = np.random.default_rng(0).normal(size=(3, 32, 6, 3, 16)).astype(np.float32)
    x[..., 3:5] *= 20
    exact, int4 = np.asarray(model(x[0])), jq.ArrayConfig(format=jq.INT4)
    nearest, _ = quantize(model, int4)
    quantized, _ = quantize(model, int4, method=methods.AWQ(), batches=list(x))
    errors = [relative_error(np.asarray(y(x[0])), exact) for y in (nearest, quantized)]
    assert errors[1] < 0.8 * errors[0]
    heads: Any = quantized.get_layer("heads")
    multiplier = np.asarray(heads.quantized_weight("kernel").inputs.multiplier)
    assert multiplier.shape == (16,)
    assert multiplier[3:5].max() < 0.6 * np.delete(multiplier, [3, 4]).min()


PROBLEMS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no batches": (INT4_G16, {"method": methods.GPTQ()}, "GPTQ needs batches, what the model is"),
    "no batches for rules": (
        [jq.Rule("*", INT4_G16, method=methods.GPTQ())],
        {},
        "GPTQ needs batches, what the model is",
    ),
    "empty": (INT4_G16, {"method": methods.GPTQ(), "batches": []}, "at least one batch; got a"),
    "no method": (INT4_G16, {"batches": batches()}, "batches are for methods; got method=None"),
    "rows of a batch": (
        INT4_G16,
        {"method": methods.GPTQ(), "batches": batches()[0]},
        r"got a batch of shape \(6,\) for inputs of shape \(None, 6\). Pass batches=\[x\] for one",
    ),
    "labels": (
        INT4_G16,
        {"method": methods.GPTQ(), "batches": [(batches()[0], np.zeros(16))]},
        r"got a batch of shape \(\(16, 6\), \(16,\)\) .* without labels. The model raises: Layer",
    ),
    "padding": (
        jq.ArrayConfig(format=jq.INT4, group_size=5),
        {"method": methods.GPTQ(), "batches": batches()},
        "methods need groups that divide the axes that share a scale",
    ),
    "rotation": (
        INT4_G16,
        {"method": methods.Rotation(), "batches": batches()},
        "at most a multiplier, like .*with rotation for 'kernel'",
    ),
}


class Halved(layers.Conv2D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel) / 2


class OwnKernel(keras.layers.Layer):
    """A custom layer that creates its own convolution kernel."""

    def build(self, input_shape):
        self.filters = self.add_weight(name="filters", shape=(3, 3, input_shape[-1], 4))

    def call(self, inputs):
        return keras.ops.conv(inputs, self.filters, padding="same")


def model_of_convolutions() -> Any:
    keras.utils.set_random_seed(0)
    start = keras.Input((5, 6, 4))
    x = keras.layers.Conv2D(6, (1, 3), name="first")(start)
    x = keras.layers.Conv2DTranspose(8, 2, name="up")(keras.layers.Conv2D(6, 1, name="one")(x))
    x = OwnKernel(name="own")(Halved(4, 3, name="halved", padding="same")(x))
    x = keras.layers.DepthwiseConv2D(2, name="each")(x)
    x = keras.layers.SeparableConv2D(4, 2, name="both")(x)
    return keras.Model(start, keras.layers.Conv2D(4, 1, groups=2, name="halves")(x))


WINDOWS = ["first/kernel", "up/kernel", "own/filters"]
GROUPS = ["each/kernel", "both/depthwise_kernel", "halves/kernel"]
UNFIT: dict[str, tuple[Any, str, list[str]]] = {
    "transform": (methods.SmoothQuant(), "SmoothQuant", WINDOWS),
    "transform and method": ([methods.AWQ(), methods.GPTQ()], "AWQ", WINDOWS),
    "method": (methods.GPTQ(), "GPTQ", []),
}


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("name", UNFIT)
def test_convolutions_that_do_not_support_a_method_are_listed(name):
    method, item, windows = UNFIT[name]
    model = model_of_convolutions()
    data = [np.random.default_rng(0).normal(size=(2, 5, 6, 4)).astype(np.float32)]
    with pytest.raises(ValueError, match="was not changed; fix these") as raised:
        quantize(model, jq.W8A8, method=method, batches=data)
    wanted = dict.fromkeys(windows, f"{item} changes each element of a window differently")
    wanted |= dict.fromkeys(GROUPS, f"{item} does not support convolutions in groups, such as")
    found = [line.strip().split(": ") for line in str(raised.value).splitlines()[1:]]
    assert {path for path, _ in found} == wanted.keys()
    assert all(why.startswith(wanted[path]) for path, why in found)

    # The others are quantized, and reported with the reason.
    names = [path.split("/")[0] for path in wanted]
    kept = quantize(model, jq.W8A8, method=method, batches=data, keep=names)
    left = quantize(model, jq.W8A8, method=method, batches=data, strict=False)
    reasons = {row.path: str(row.reason) for row in left[1].rows}
    assert all(f"{path.split('/')[1]}: {why}" in reasons[path] for path, why in wanted.items())
    assert sum(row.scheme is not None for row in left[1].rows) == 5 - len(windows)
    np.testing.assert_array_equal(kept[0](data[0]), left[0](data[0]))

    # As the problems say.
    rules = [jq.Rule(path, jq.W8A8, method=methods.Nearest()) for path in GROUPS]
    rules += [jq.Rule(path, jq.W8A8, method=methods.GPTQ()) for path in windows]
    quantized, report = quantize(
        model, [*rules, jq.Rule("*", jq.W8A8)], method=method, batches=data
    )
    assert sum(row.scheme is not None for row in report.rows) == 9
    assert 0 < relative_error(np.asarray(quantized(data[0])), np.asarray(model(data[0]))) < 0.05


def test_weights_that_no_method_can_quantize_are_left_in_float_if_asked():
    model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(8, name="good")])
    model.add(keras.layers.Dense(4, name="bad"))
    model.get_layer("bad").kernel.assign(np.full((8, 4), np.nan))
    scheme = jq.ArrayConfig(format=jq.INT4)
    x = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
    with pytest.raises(ValueError, match=r"problem:\n  \S*bad/kernel: holds NaN or Inf, shape"):
        quantize(model, scheme, method=methods.GPTQ(), batches=[x])
    _, report = quantize(model, scheme, method=methods.GPTQ(), batches=[x], strict=False)
    found = {row.path.split("/")[-2]: row for row in report.rows if "kernel" in row.path}
    assert (found["good"].scheme, found["bad"].scheme) == ("int4 per channel", None)
    assert "holds NaN or Inf" in str(found["bad"].reason)


def test_batches_in_one_array():
    stacked = np.stack(batches(2))
    made = [
        quantize(model_of_every_kind(), INT4_G16, method=methods.GPTQ(), batches=found)[0]
        for found in (stacked, list(stacked))
    ]
    np.testing.assert_array_equal(made[0](stacked[0]), made[1](stacked[0]))


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_methods_cannot_do_is_an_error(name):
    rules, arguments, words = PROBLEMS[name]
    with pytest.raises(ValueError, match=words):
        quantize(model_of_every_kind(), rules, **arguments)


TEXT = ["the quick brown fox jumps over the lazy dog. " * 20]


def tokenize(text):
    return np.frombuffer(text.encode(), np.uint8) % 40


def test_configs_of_keras_stand_for_a_scheme_a_method_and_batches():
    make: Any = keras.quantizers.GPTQConfig
    config = make(TEXT, tokenize, num_samples=8, sequence_length=6, group_size=16)
    model = model_of_every_kind()
    quantized, report = quantize(model, config)
    assert schemes(report)["hidden/kernel"] == "int4 g16 asymmetric"
    tokens = tokenize(TEXT[0])
    starts = np.linspace(0, len(tokens) - 6, 8).round().astype(int)
    data = [tokens[i : i + 6][None].astype(np.int32) for i in starts]
    scheme = jq.ArrayConfig(format=jq.INT4, group_size=16, symmetric=False)
    wanted, _ = quantize(model, scheme, method=methods.GPTQ(), batches=data)
    np.testing.assert_array_equal(quantized(data[0]), wanted(data[0]))

    with pytest.raises(ValueError, match=r"has its own method and data set; got method=None and b"):
        quantize(model, config, batches=data)
    short = make(["ab"], tokenize, sequence_length=6)
    with pytest.raises(ValueError, match="at least one sequence of 6 tokens; got 2 tokens"):
        quantize(model, short)
    inputs = {"image": keras.Input((6,), name="image")}
    odd = keras.Model(inputs, keras.layers.Dense(3)(inputs["image"]))
    with pytest.raises(ValueError, match=r"inputs of model .* must be of token_ids.*; got \['im"):
        quantize(odd, config)


def test_options_of_configs_of_keras_and_inputs_of_models_of_kerashub():
    make: Any = keras.quantizers.GPTQConfig
    options = {"num_samples": 1, "sequence_length": 6, "weight_bits": 8, "group_size": 8}
    config = make(TEXT, tokenize, **options, symmetric=True, activation_order=True)
    names = ("token_ids", "padding_mask", "segment_ids", "position_ids")
    inputs: Any = {name: keras.Input((6,), name=name) for name in names}
    model = keras.Model(inputs, keras.layers.Add()(list(inputs.values())))
    found = calibration_of(config, model)
    assert found.rules == jq.Scheme(jq.ArrayConfig(format=jq.INT8, group_size=8))
    assert found.method == methods.GPTQ(act_order=True)
    (batch,) = found.batches
    tokens = tokenize(TEXT[0])[None, :6]
    wanted = tokens, np.ones_like(tokens), np.zeros_like(tokens), np.arange(6)[None]
    for name, values in zip(names, wanted, strict=True):
        np.testing.assert_array_equal(batch[name], values)
    undamped = calibration_of(make(TEXT, tokenize, sequence_length=6, hessian_damping=0), None)
    assert undamped.method == methods.GPTQ(damping=1e-6)
    damped = calibration_of(make(TEXT, tokenize, sequence_length=6, hessian_damping=0.2), None)
    assert damped.method == methods.GPTQ(damping=0.2)


@pytest.mark.skipif(not hasattr(keras.quantizers, "AWQConfig"), reason="Keras before 3.14")
def test_awq_of_keras():
    make: Any = getattr(keras.quantizers, "AWQConfig", None)
    options = {"num_samples": 8, "sequence_length": 6, "group_size": -1}
    config = make(TEXT, tokenize, **options, num_grid_points=7)
    assert calibration_of(config, None).method == methods.AWQ(grid=7)
    quantized, report = quantize(model_of_every_kind(), config)
    assert schemes(report)["hidden/kernel"] == "int4 per channel asymmetric"
    assert quantized.get_layer("hidden").variables[-1].name == "kernel_multiplier"
