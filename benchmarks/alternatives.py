"""Matrix multiplications by other libraries, as each is meant to be used; None if not installed."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
# Otherwise the spinning threads of one library slow down the next contender.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import copy
import importlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxquant as jq

from . import onnx_products
from .products import SCHEMES, Contender, of_xla, ours


def optional(name: str) -> Any:
    """A module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def of_keras(name: str, mode: str, arithmetic: str = "bf16") -> Contender | None:
    """A Dense layer of Keras, quantized."""
    keras = optional("keras")
    if keras is None:
        return None
    layers: dict[Any, Any] = {}

    def shapes(values):
        return tuple(v.shape for v in values)

    def prepare(w):
        layer = keras.layers.Dense(w.shape[1], use_bias=False, dtype=w.dtype.name)
        layer.build((None, w.shape[0]))
        layer.kernel.assign(w)
        layer.quantize(mode)
        values = [v.value for v in layer.non_trainable_variables + layer.trainable_variables]
        layers[shapes(values)] = layer
        return values

    def run(x, values):
        layer = layers[shapes(values)]
        variables = layer.non_trainable_variables + layer.trainable_variables
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return layer(x)

    return Contender(name, False, prepare, run, arithmetic=arithmetic)


def of_qwix(name: str, weights: str, inputs: str | None, tile: int | None) -> Contender | None:
    """Qwix's quantized arrays and `dot_general`."""
    qwix = optional("qwix")
    if qwix is None:
        return None
    tiled = {} if tile is None else {"tiled_axes": {0: tile}}

    def prepare(w):
        return qwix.quantize(w, weights, channelwise_axes=[1], **tiled)

    def run(x, q):
        if inputs is not None:
            x = qwix.quantize(x, inputs, channelwise_axes=[0])
        return qwix.dot_general(x, q, (((1,), (0,)), ((), ())))

    is_integer = inputs is not None
    return Contender(name, False, prepare, run, arithmetic="int8" if is_integer else "bf16")


def of_aqt(name: str) -> Contender | None:
    """AQT's int8 matrix multiplication with weights quantized in advance, as for serving."""
    config, quantizer = optional("aqt.jax.v2.config"), optional("aqt.jax.v2.aqt_quantizer")
    if config is None or quantizer is None:
        return None
    weights, product = quantizer.quantizer_make(8), config.dot_general_make(8, 8)

    def run(x, q):
        # The codes of the right operand are given: only its shape and dtype are used.
        unused = jnp.zeros(q.qvalue.shape, x.dtype)
        return product.dg_core(x, unused, None, q, (((1,), (0,)), ((), ())))[0]

    return Contender(name, False, lambda w: weights.quant(w, calibration_axes=(0,))[0], run)


def of_torchao(name: str) -> Contender | None:
    """torchao's int8 weights with dynamic int8 activations, recompiled for each shape."""
    torchao = optional("torchao.quantization")
    if torchao is None:
        return None
    torch = importlib.import_module("torch")
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def prepare(w):
        layer = torch.nn.Linear(*w.shape, bias=False)
        layer.weight.data = torch.from_numpy(np.asarray(w).T.copy())
        layer = torch.nn.Sequential(layer).eval()
        torchao.quantize_(layer, torchao.Int8DynamicActivationInt8WeightConfig())
        return layer[0].weight

    def recompile(run):
        # After eight shapes it silently stops compiling.
        torch._dynamo.reset()
        compiled = torch.compile(run, dynamic=False)

        def call(x, weight):
            with torch.inference_mode():
                return compiled(x, weight)

        return call

    return Contender(
        name,
        False,
        prepare,
        torch.nn.functional.linear,
        "float32",
        compile=recompile,
        place=lambda x: torch.from_numpy(np.array(x)),
        copy=copy.deepcopy,
        # Codes, and one float32 scale per column.
        size=lambda weight: weight.numel() + 4 * weight.shape[0],
    )


def contenders(
    schemes: Mapping[str, jq.Scheme] = SCHEMES, platform: str | None = None
) -> tuple[list[Contender], list[str]]:
    """Every contender that can run here, float32 first, and the names of those not installed."""
    found: dict[str, Contender | None] = {
        "Keras int8": of_keras("Keras int8", "int8", "int8"),
        "Keras int4 g128": of_keras("Keras int4 g128", "int4"),
        "Qwix w8a8": of_qwix("Qwix w8a8", "int8", "int8", None),
        "Qwix w4 g128": of_qwix("Qwix w4 g128", "int4", None, 128),
        "AQT w8a8": of_aqt("AQT w8a8"),
        "ONNX Runtime w8a8": None,
        "ONNX Runtime w4a8 g128": None,
        "torchao w8a8": of_torchao("torchao w8a8"),
    }
    onnx, runtime = optional("onnx"), optional("onnxruntime")
    if onnx is not None and runtime is not None:
        for name, build in onnx_products.BUILDERS.items():
            found[f"ONNX Runtime {name}"] = onnx_products.of_onnx(
                f"ONNX Runtime {name}", build, onnx, runtime
            )
    here = [of_xla("float32"), of_xla("bfloat16")] + [c for c in found.values() if c is not None]
    missing = [name for name, c in found.items() if c is None]
    return here + [ours(name, scheme, platform) for name, scheme in schemes.items()], missing
