"""Ways to quantize float32 matrices: ours, Keras' and Qwix's, by what comes out."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

import jaxquant as jq

Weights = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """One way to quantize matrices (K, N), with scales along K.

    Attributes:
        name: as printed.
        family: what comes out; those of one family are compared.
        library: module that must be installed; None for this library's.
        prepare: weights -> the call that quantizes them; it is made again for each call, and
            not timed.
    """

    name: str
    family: str
    library: str | None
    prepare: Callable[[Weights], Callable[[], Any]]

    @property
    def is_ours(self) -> bool:
        """Whether it is this library's."""
        return self.library is None


def _with(scheme: jq.Scheme, **changes: Any) -> jq.Scheme:
    return dataclasses.replace(scheme, weights=dataclasses.replace(scheme.weights, **changes))


_INT2 = _with(jq.W4A16, format=jq.INT2, group_size=64, symmetric=False)
_ASYMMETRIC = "int4 g128 asymmetric"
# Name: family, scheme.
_OURS = {
    "W8A8": ("int8", jq.W8A8),
    "W8A8 percentile 99.9": ("int8, percentile", _with(jq.W8A8, range=jq.Percentile(99.9))),
    "W8A8 MinMSE": ("int8, least squares", _with(jq.W8A8, range=jq.MinMSE())),
    "W4A16": ("int4 g128", jq.W4A16),
    "W4A16_ASYM": (_ASYMMETRIC, jq.W4A16_ASYM),
    "W4A16 percentile 99.9": ("int4 g128, percentile", _with(jq.W4A16, range=jq.Percentile(99.9))),
    "W4A16 MinMSE": ("int4 g128, least squares", _with(jq.W4A16, range=jq.MinMSE())),
    "INT2 g64": ("int2 g64 asymmetric", _INT2),
    "FP8": ("fp8", jq.FP8),
    "NF4A16": ("nf4 g64", jq.NF4A16),
    "MXFP8A8": ("mxfp8", jq.MXFP8A8),
    "MXFP4A16": ("mxfp4", jq.MXFP4A16),
    "NVFP4A16": ("nvfp4", jq.NVFP4A16),
}
# Name: family, type, elements per scale, calibration.
_QWIX = {
    "Qwix int8": ("int8", "int8", None, "absmax"),
    "Qwix int4": ("int4 g128", "int4", 128, "absmax"),
    "Qwix int4 minmax": (_ASYMMETRIC, "int4", 128, "minmax"),
    "Qwix float8_e4m3fn": ("fp8", "float8_e4m3fn", None, "absmax"),
    "Qwix nf4": ("nf4 g64", "nf4", 64, "absmax"),
    "Qwix mxfp8": ("mxfp8", "mxfp8", 32, "absmax"),
    "Qwix mxfp4": ("mxfp4", "mxfp4", 32, "absmax"),
    "Qwix nvfp4": ("nvfp4", "nvfp4", 16, "absmax"),
}


def _ours(scheme):
    """A whole tree, as it is used."""
    rules = jq.Rule("*", scheme, axis=-2)
    return lambda weights: partial(jq.tree.quantize, weights, rules)


def _leaf_by_leaf(function):
    """A compiled function of one matrix. Waits for each: else all temporaries live at once."""
    compiled = jax.jit(function)
    return lambda weights: lambda: [jax.block_until_ready(compiled(w)) for w in weights]


def _of_qwix(kind, tile, calibration):
    tiled = {} if tile is None else {"tiled_axes": {0: tile}}

    def quantize(w):
        return importlib.import_module("qwix").quantize(
            w, kind, channelwise_axes=[1], calibration_method=calibration, **tiled
        )

    return _leaf_by_leaf(quantize)


def _abs_max_of_keras(w):
    return importlib.import_module("keras").quantizers.abs_max_quantize(w, axis=0)


def _dense_layers(mode):
    """`Dense.quantize`, as `model.quantize` calls it."""

    def prepare(weights):
        keras = importlib.import_module("keras")
        layers = [keras.layers.Dense(w.shape[1], use_bias=False) for w in weights]
        for layer, w in zip(layers, weights, strict=True):
            layer.kernel_initializer = lambda shape, dtype=None, w=w: w
            layer.build((None, w.shape[0]))
        return partial(_quantize_layers, layers, mode)

    return prepare


def _quantize_layers(layers, mode):
    for layer in layers:
        layer.quantize(mode)
    return [v.value for layer in layers for v in layer.variables]


# Name: family, prepare.
_KERAS = {
    "Keras abs_max_quantize": ("int8", _leaf_by_leaf(_abs_max_of_keras)),
    "Keras Dense int8": ("int8", _dense_layers("int8")),
    "Keras Dense int4": (_ASYMMETRIC, _dense_layers("int4")),
}


def quantizers() -> tuple[list[Quantizer], list[str]]:
    """All that can run here, by family, and the names of those whose library is missing."""
    ours = [Quantizer(name, f, None, _ours(scheme)) for name, (f, scheme) in _OURS.items()]
    others = [Quantizer(name, f, "keras", prepare) for name, (f, prepare) in _KERAS.items()]
    others += [Quantizer(n, f, "qwix", _of_qwix(*options)) for n, (f, *options) in _QWIX.items()]
    is_there = {name: importlib.util.find_spec(name) is not None for name in ("keras", "qwix")}
    here = ours + [q for q in others if q.library and is_there[q.library]]
    families = [family for family, _ in _OURS.values()]
    missing = [q.name for q in others if q not in here]
    return sorted(here, key=lambda q: families.index(q.family)), missing
