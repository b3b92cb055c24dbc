"""Quantized and lifted models in files of other programs.

Tests that need TensorFlow, jax2onnx or ONNX Runtime are skipped where these are not installed. To
run them, install `tensorflow-cpu jax2onnx onnxruntime` with pip in a separate environment, then run
`pytest --all tests/keras/test_export.py tests/keras/test_layer_state.py` there.
"""

import subprocess
import sys
from typing import Any

import jax
import keras
import numpy as np
import pytest
from jax import export
from keras.src.utils import module_utils  # Keras does not tell what writes ONNX.

import jaxquant as jq
from jaxquant.keras import compat, functional, quantize, to_stock

stock = keras.layers
# By name: the layer, and the shape of one example.
LAYERS: dict[str, Any] = {
    "Dense": (lambda: stock.Dense(4), (20,)),
    "EinsumDense": (lambda: stock.EinsumDense("abc,cd->abd", (6, 8)), (6, 20)),
    "Embedding": (lambda: stock.Embedding(20, 8), (6,)),
    "Conv2D": (lambda: stock.Conv2D(8, 3), (8, 8, 4)),
    "DepthwiseConv2D": (lambda: stock.DepthwiseConv2D(3), (8, 8, 4)),
    "SeparableConv1D": (lambda: stock.SeparableConv1D(8, 3), (8, 4)),
    "Conv2DTranspose": (lambda: stock.Conv2DTranspose(8, 3), (8, 8, 4)),
    "LSTM": (lambda: stock.LSTM(8), (5, 8)),
    "TimeDistributed": (lambda: stock.TimeDistributed(stock.Dense(8)), (5, 8)),
}


def for_any_batch(run, x, *args):
    """`run` of (*args, x), exported for batches of any size and read from the bytes of its file."""
    (batch,) = export.symbolic_shape("batch")
    like = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    written = export.export(jax.jit(run))(*args, like).serialize()
    return export.deserialize(written).call(*args, x)


@pytest.mark.some_rows(4)
@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_quantized_layer_is_exported_for_any_batch(name, mode):
    keras.utils.set_random_seed(0)
    make, shape = LAYERS[name]
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    x = np.abs(10 * x).astype(np.int32) % 20 if name == "Embedding" else x
    model = keras.Sequential([keras.Input(shape, dtype=x.dtype.name), make()])
    quantized, _ = quantize(model, mode)
    apply, params = functional(quantized)
    found = for_any_batch(lambda x: apply(params, x), x)
    np.testing.assert_allclose(found, quantized(x), rtol=1e-5, atol=1e-5)


X = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)


def small() -> Any:
    keras.utils.set_random_seed(0)
    layers = [stock.Dense(32, activation="relu"), stock.Dense(8)]
    return keras.Sequential([keras.Input((64,)), *layers])


def lifted():
    """A stock model, lifted, and its quantized parameters."""
    apply, params = functional(small())
    rules = jq.uses(apply, params, X).rules(jq.W8A8)
    return jq.lift(apply), jq.tree.quantize(params, rules)


def test_a_lifted_model_is_exported_for_any_batch():
    run, params = lifted()
    found = for_any_batch(run, X, params)
    np.testing.assert_allclose(found, run(params, X), rtol=1e-5, atol=1e-5)


SERVE = """
import sys
import numpy as np
import tensorflow as tf

x, folders, out = np.load(sys.argv[1]), sys.argv[2:-1], sys.argv[-1]
loaded = [tf.saved_model.load(folder) for folder in folders]
np.save(out, np.stack([model.serve(x) for model in loaded]))
assert "jaxquant" not in sys.modules
"""


@pytest.mark.filterwarnings("ignore")
def test_a_saved_model_runs_in_tensorflow_alone(tmp_path):
    tf = pytest.importorskip("tensorflow", reason="pip install tensorflow-cpu")
    from jax.experimental import jax2tf  # Needs TensorFlow.

    wanted, folders = [], []
    for name, rules in [("W8A8", jq.W8A8), ("W4A16", jq.W4A16), ("NF4A16", jq.NF4A16)]:
        quantized, _ = quantize(small(), rules)
        quantized.export(tmp_path / name, verbose=False)
        wanted += [quantized(X)]
        folders += [str(tmp_path / name)]
    run, params = lifted()
    module, folder = tf.Module(), str(tmp_path / "lifted")
    serve: Any = jax2tf.convert(lambda x: run(params, x), polymorphic_shapes=["batch, 64"])
    signature = [tf.TensorSpec((None, 64), "float32")]
    module.serve = tf.function(serve, input_signature=signature, autograph=False)
    tf.saved_model.save(module, folder)
    np.save(tmp_path / "x.npy", X)
    arguments = [tmp_path / "x.npy", *folders, folder, tmp_path / "found.npy"]
    subprocess.run([sys.executable, "-c", SERVE, *map(str, arguments)], check=True)
    found = np.load(tmp_path / "found.npy")
    np.testing.assert_allclose(found, [*wanted, run(params, X)], rtol=1e-4, atol=1e-5)


def test_litert_needs_another_backend(tmp_path):
    pytest.importorskip("tensorflow", reason="pip install tensorflow-cpu")
    quantized, _ = quantize(small(), "int8")
    with pytest.raises(ValueError, match="LiteRT export requires TensorFlow or PyTorch"):
        quantized.export(tmp_path / "model.tflite", format="litert")


def check_onnx(model, file):
    """Writes a model as ONNX, and compares the outputs of ONNX Runtime; returns them."""
    pytest.importorskip("jax2onnx", reason="pip install jax2onnx")
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    wanted = model(X)
    model.export(file, format="onnx", verbose=False)
    session = runtime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: X})
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_codes(tmp_path):
    model = keras.Sequential([keras.Input((64,)), stock.Dense(256), stock.Dense(8)])
    quantized, _ = quantize(model, jq.W8A16)
    check_onnx(quantized, tmp_path / "model.onnx")
    floats = sum(v.value.nbytes for v in model.variables)
    assert (tmp_path / "model.onnx").stat().st_size < 0.4 * floats


class TracesOnly:
    """In place of jax2onnx: calls the function as it does, and writes nothing."""

    @staticmethod
    def to_onnx(function, inputs, **options):
        (x,) = inputs
        jax.eval_shape(function, jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype))


@pytest.mark.skipif(compat._ONNX_EXPORTER is None, reason="Keras writes ONNX by TensorFlow")
@pytest.mark.parametrize("scheme", [jq.W4A16, jq.NF4A16, jq.FP8, jq.W8A8], ids=str)
def test_onnx_of_codes_that_it_does_not_hold_raises(scheme, tmp_path, monkeypatch):
    monkeypatch.setattr(module_utils, "jax2onnx", TracesOnly)
    quantized, _ = quantize(small(), scheme)
    quantized(X)
    words = r"ONNX files hold int8 codes, with float activations; got QTensor.*kernel\. Quant"
    with pytest.raises(ValueError, match=words):
        quantized.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    quantized(X)
    stays, _ = quantize(small(), jq.W8A16)
    stays(X)
    stays.export(tmp_path / "model.onnx", format="onnx", verbose=False)


@pytest.mark.skipif(compat._ONNX_EXPORTER is None, reason="Keras writes ONNX by TensorFlow")
def test_onnx_of_a_table_of_codes_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(module_utils, "jax2onnx", TracesOnly)
    start = keras.Input((6,), dtype="int32")
    model = keras.Model(start, stock.Dense(4)(stock.Embedding(20, 8, name="table")(start)))
    quantized, _ = quantize(model, jq.W8A16)
    x = np.zeros((2, 6), np.int32)
    quantized(x)
    with pytest.raises(ValueError, match=r"got table\. Quantize with keep=\['table'\]"):
        quantized.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    kept, _ = quantize(model, jq.W8A16, keep=["table"])
    kept(x)
    kept.export(tmp_path / "model.onnx", format="onnx", verbose=False)


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_the_float_form(tmp_path):
    quantized, _ = quantize(small(), jq.NF4A16)
    found = check_onnx(to_stock(quantized, dequantize=True), tmp_path / "model.onnx")
    np.testing.assert_allclose(found, quantized(X), rtol=1e-4, atol=1e-4)
