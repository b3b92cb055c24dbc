"""Methods of other libraries, with the same weights and statistics of the activations.

Each gets a matrix and what it asks for of the activations; its result is decoded to floats, so that
all run in the same model. Bits count scales of 16 bits, also where a library stores 32.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.methods import MaxAbs, MeanAbs, SecondMoment

from . import ggml

GROUP_SIZE = 32
_SYMMETRIC = 4 + 16 / GROUP_SIZE
_ASYMMETRIC = 4 + (16 + 4) / GROUP_SIZE


@dataclasses.dataclass(frozen=True)
class Peer:
    """A method of another library.

    Attributes:
        name: of the library and the method.
        bits: per weight.
        module: which must be installed.
        quantize: (weights (L, N, K), means of statistics by class, each (L, ...)) -> the decoded
            weights (L, N, K).
    """

    name: str
    bits: float
    module: str
    quantize: Callable[[jax.Array, Mapping[Any, jax.Array]], Any]


def installed() -> Iterator[Peer]:
    """The peers whose library is installed."""
    for peer in PEERS:
        if importlib.util.find_spec(peer.module):
            yield peer


def quantized(peer: Peer, layers: Any, statistics: Mapping[str, Any]) -> Any:
    """The kernels of stacked layers, quantized by a peer and decoded again."""
    out = dict(layers)
    for name, layer in layers.items():
        if isinstance(layer, Mapping) and "kernel" in layer:
            found = statistics[f"layers/0/{name}/kernel"]
            means = {kind: jnp.asarray(statistic.finish()) for kind, statistic in found.items()}
            decoded = peer.quantize(layer["kernel"].astype(jnp.float32), means)
            out[name] = {**layer, "kernel": jnp.asarray(decoded, layer["kernel"].dtype)}
    return out


def _by_ggml(number: int, weights: jax.Array, means: Mapping[Any, jax.Array]) -> Any:
    squares = jnp.diagonal(means[SecondMoment], axis1=-2, axis2=-1)
    pairs = zip(np.asarray(weights), np.asarray(squares), strict=True)
    return np.stack([ggml.round_trip(number, *pair) for pair in pairs])


def _by_keras_gptq(weights: jax.Array, means: Mapping[Any, jax.Array]) -> Any:
    from keras.src.quantizers import gptq, quantizers

    parameters = partial(
        quantizers.compute_quantization_parameters,
        bits=4,
        symmetric=True,
        per_channel=True,
        group_size=GROUP_SIZE,
    )

    def of_matrix(pair: tuple[jax.Array, jax.Array]) -> Any:
        weight, moment = pair
        damping = 0.01 * jnp.mean(jnp.diagonal(moment))  # As its class does.
        inverse = jnp.linalg.inv(moment + damping * jnp.eye(len(moment)))
        codes, scale, zero, index = gptq.gptq_quantize_matrix(
            weight, inverse, group_size=GROUP_SIZE, compute_scale_zero=parameters
        )
        return quantizers.dequantize_with_sz_map(codes, scale, zero, index)

    return jax.jit(partial(jax.lax.map, of_matrix))((weights, means[SecondMoment]))


def _by_keras_awq(weights: jax.Array, means: Mapping[Any, jax.Array]) -> Any:
    from keras.src.quantizers import awq, quantizers

    def of_matrix(weight: jax.Array, largest: jax.Array) -> Any:
        found: Any = awq.awq_quantize_matrix(weight, largest, group_size=GROUP_SIZE)
        codes, scale, zero, factors, index = found
        return jnp.asarray(quantizers.dequantize_with_sz_map(codes, scale, zero, index)) / factors

    return jnp.stack([of_matrix(*pair) for pair in zip(weights, means[MaxAbs], strict=True)])


def _qwix(name: str) -> Any:
    importlib.import_module("qwix")  # Before its other modules.
    return importlib.import_module(name)


def _how(qarray: Any) -> Any:
    return qarray.HowToQuantize(
        qtype=jnp.int4,
        channelwise_axes=(0,),
        tiled_axes={1: GROUP_SIZE},
        calibration_method="absmax",
    )


def _by_qwix_gptq(weights: jax.Array, means: Mapping[Any, jax.Array]) -> Any:
    qarray, core = _qwix("qwix._src.core.qarray"), _qwix("qwix.contrib.gptq_core")

    def of_matrix(pair: tuple[jax.Array, jax.Array]) -> Any:
        return qarray.dequantize(core.quantize_weight(*pair, _how(qarray))[0])

    return jax.jit(partial(jax.lax.map, of_matrix))((weights, means[SecondMoment]))


def _by_qwix_awq(weights: jax.Array, means: Mapping[Any, jax.Array]) -> Any:
    qarray, core = _qwix("qwix._src.core.qarray"), _qwix("qwix.contrib.awq_core")

    def of_matrix(pair: tuple[jax.Array, jax.Array]) -> Any:
        found, factors = core.quantize_weight(*pair, _how(qarray))
        return qarray.dequantize(found) / factors

    return jax.jit(partial(jax.lax.map, of_matrix))((weights, means[MeanAbs]))


PEERS = (
    # Types of ggml with blocks of 32, which divide all widths, by their codes.
    Peer("llama.cpp Q4_0, imatrix", 4.5, "xllamacpp", partial(_by_ggml, 2)),
    Peer("llama.cpp IQ4_NL, imatrix", 4.5, "xllamacpp", partial(_by_ggml, 20)),
    Peer("llama.cpp Q4_1, imatrix", 5.0, "xllamacpp", partial(_by_ggml, 3)),
    Peer("Keras GPTQ", _SYMMETRIC, "keras", _by_keras_gptq),
    Peer("Keras AWQ", _ASYMMETRIC, "keras", _by_keras_awq),
    Peer("Qwix GPTQ", _SYMMETRIC, "qwix", _by_qwix_gptq),
    Peer("Qwix AWQ", _SYMMETRIC, "qwix", _by_qwix_awq),
)
