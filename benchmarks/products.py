"""Quantized products and their alternatives, as calls that do the same work.

A contender takes float weights and says what a call computes: inputs by these weights.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import dataclasses
from collections.abc import Callable, Iterable
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
        arithmetic: kind of both operands of the product, as far as the scheme allows: "bf16",
            "int8", "fp8".
    """

    name: str
    is_ours: bool
    prepare: Callable[[jax.Array], Any]
    run: Product
    dtype: str | None = None
    arithmetic: str = "bf16"


def ours(name: str, scheme: jq.Scheme, platform: str | None = None) -> Contender:
    """A scheme of this library, stored as `tree.quantize` stores it for a platform."""
    rule = [jq.Rule("*", scheme, axis=-2)]

    def prepare(w):
        return jq.tree.quantize({"kernel": w}, rule, platform=platform)["kernel"]

    return Contender(name, True, prepare, jq.matmul, arithmetic=_arithmetic(scheme))


def _arithmetic(scheme):
    if scheme.inputs is None:
        return "bf16"
    formats = (scheme.weights.format, scheme.inputs.format)
    return "int8" if all(f.rounds for f in formats) else "fp8"


def threefold(contender: Contender) -> Contender:
    """The same inputs by three matrices, as those of queries, keys and values."""
    return dataclasses.replace(
        contender,
        name=f"{contender.name} x 3",
        prepare=lambda w: tuple(contender.prepare(w) for _ in range(3)),
        run=lambda x, weights: tuple(contender.run(x, w) for w in weights),
    )


def once_quantized(contender: Contender, inputs: jq.ArrayConfig) -> Contender:
    """A `threefold` one whose inputs are quantized before the first product."""

    def run(x, weights):
        return contender.run(jq.quantize(x, inputs), weights)

    return dataclasses.replace(contender, name=f"{contender.name}, quantized once", run=run)


def of_keras(name: str, mode: str, arithmetic: str = "bf16") -> Contender | None:
    """A Dense layer of Keras, quantized; None where Keras is not installed."""
    try:
        import keras
    except ImportError:
        return None

    def prepare(w):
        layer: Any = keras.layers.Dense(w.shape[1], use_bias=False, dtype=w.dtype.name)
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

    return Contender(name, False, prepare, run, arithmetic=arithmetic)


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

    is_integer = inputs is not None
    return Contender(name, False, prepare, run, arithmetic="int8" if is_integer else "bf16")


def _cast(dtype):
    return lambda w: w.astype(dtype)


SCHEMES = ("W8A8", "W8A16", "W4A16", "W4A8", "NF4A16")


def contenders(
    schemes: Iterable[str] = SCHEMES, platform: str | None = None
) -> tuple[list[Contender], list[str]]:
    """All that can run here, float32 first, and the names of what is not installed."""
    found = {
        "XLA float32": Contender("XLA float32", False, _cast("float32"), jnp.matmul, "float32"),
        "XLA bfloat16": Contender("XLA bfloat16", False, _cast("bfloat16"), jnp.matmul, "bfloat16"),
        "Keras int8": of_keras("Keras int8", "int8", "int8"),
        "Keras int4 g128": of_keras("Keras int4 g128", "int4"),
        "Qwix w8a8": of_qwix("Qwix w8a8", "int8", "int8", None),
        "Qwix w4 g128": of_qwix("Qwix w4 g128", "int4", None, 128),
    }
    here = [c for c in found.values() if c is not None]
    missing = [name for name, c in found.items() if c is None]
    return here + [ours(name, jq.SCHEMES[name], platform) for name in schemes], missing
