"""Quantized products and their alternatives, as calls that do the same work.

A contender takes float weights and says what a call computes: inputs by these weights.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxquant as jq

Product = Callable[[jax.Array, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute inputs @ weights.

    Attributes:
        name: as printed.
        is_ours: whether it is this library's.
        prepare: (K, N) float32 weights -> what `run` reads.
        run: (inputs, prepared) -> result.
        dtype: the dtype that inputs are given in; None for that of the table.
    """

    name: str
    is_ours: bool
    prepare: Callable[[jax.Array], Any]
    run: Product
    dtype: str | None = None


def ours(name: str, scheme: jq.Scheme) -> Contender:
    """A scheme of this library, stored as `tree.quantize` stores it."""
    rule = [jq.Rule("*", scheme, axis=-2)]
    return Contender(
        name, True, lambda w: jq.tree.quantize({"kernel": w}, rule)["kernel"], jq.matmul
    )


def of_keras(name: str, mode: str) -> Contender | None:
    """A Dense layer of Keras, quantized; None where Keras is not installed."""
    try:
        import keras
    except ImportError:
        return None

    def prepare(w):
        layer: Any = keras.layers.Dense(w.shape[1], use_bias=False)
        layer.build((None, w.shape[0]))
        layer.kernel.assign(w)
        layer.quantize(mode)
        layers.append(layer)
        return [v.value for v in layer.non_trainable_variables + layer.trainable_variables]

    layers: list[Any] = []

    def run(x, values):
        layer = layers[-1]
        variables = layer.non_trainable_variables + layer.trainable_variables
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return layer(x)

    return Contender(name, False, prepare, run)


def of_qwix(name: str, weights: str, inputs: str | None, tile: int | None) -> Contender | None:
    """Qwix's quantized arrays and product; None where Qwix is not installed."""
    try:
        import qwix  # pyright: ignore[reportMissingImports]  (in the extra bench)
    except ImportError:
        return None
    tiled = {} if tile is None else {"tiled_axes": {0: tile}}

    def prepare(w):
        return qwix.quantize(w, weights, channelwise_axes=[1], **tiled)

    def run(x, q):
        if inputs is not None:
            x = qwix.quantize(x, inputs, channelwise_axes=[0])
        return qwix.dot_general(x, q, (((1,), (0,)), ((), ())))

    return Contender(name, False, prepare, run)


def _cast(dtype):
    return lambda w: w.astype(dtype)


def contenders() -> tuple[list[Contender], list[str]]:
    """All that can run here, float32 first, and the names of what is not installed."""
    found = {
        "XLA float32": Contender("XLA float32", False, _cast("float32"), jnp.matmul, "float32"),
        "XLA bfloat16": Contender("XLA bfloat16", False, _cast("bfloat16"), jnp.matmul, "bfloat16"),
        "Keras int8": of_keras("Keras int8", "int8"),
        "Keras int4 g128": of_keras("Keras int4 g128", "int4"),
        "Qwix w8a8": of_qwix("Qwix w8a8", "int8", "int8", None),
        "Qwix w4 g128": of_qwix("Qwix w4 g128", "int4", None, 128),
    }
    schemes = {"W8A8": jq.W8A8, "W8A16": jq.W8A16, "W4A16": jq.W4A16, "W4A8": jq.W4A8}
    schemes |= {"NF4A16": jq.NF4A16}
    here = [c for c in found.values() if c is not None]
    missing = [name for name, c in found.items() if c is None]
    return here + [ours(name, scheme) for name, scheme in schemes.items()], missing
