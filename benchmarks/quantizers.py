"""Ways to quantize float32 matrices: ours, Keras' and Qwix's, by what comes out."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

import jaxquant as jq

from .alternatives import optional

Weights = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """One way to quantize matrices (K, N), with scales along K.

    Attributes:
        name: as printed.
        family: what comes out; those of one family are compared.
        is_ours: whether it is this library's.
        prepare: weights -> the call that quantizes them; it is made anew for each call, and
            not timed.
    """

    name: str
    family: str
    is_ours: bool
    prepare: Callable[[Weights], Callable[[], Any]]


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


def _of_qwix(qwix, kind, tile, calibration):
    tiled = {} if tile is None else {"tiled_axes": {0: tile}}
    return _leaf_by_leaf(
        lambda w: qwix.quantize(
            w, kind, channelwise_axes=[1], calibration_method=calibration, **tiled
        )
    )


def _dense_layers(keras, mode):
    """`Dense.quantize`, as `model.quantize` calls it."""

    def prepare(weights):
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


def _of_keras(keras):
    """Name: family, prepare."""
    function = partial(keras.quantizers.abs_max_quantize, axis=0)
    return {
        "Keras abs_max_quantize": ("int8", _leaf_by_leaf(function)),
        "Keras Dense int8": ("int8", _dense_layers(keras, "int8")),
        "Keras Dense int4": (_ASYMMETRIC, _dense_layers(keras, "int4")),
    }


def quantizers() -> tuple[list[Quantizer], list[str]]:
    """All that can run here, by family, and the names of the libraries that are missing."""
    found = [Quantizer(name, f, True, _ours(scheme)) for name, (f, scheme) in _OURS.items()]
    keras, qwix = optional("keras"), optional("qwix")
    if keras is not None:
        found += [Quantizer(name, f, False, p) for name, (f, p) in _of_keras(keras).items()]
    if qwix is not None:
        found += [Quantizer(n, f, False, _of_qwix(qwix, *a)) for n, (f, *a) in _QWIX.items()]
    families = [family for family, _ in _OURS.values()]
    missing = [n for n, module in {"Keras": keras, "Qwix": qwix}.items() if module is None]
    return sorted(found, key=lambda q: families.index(q.family)), missing
