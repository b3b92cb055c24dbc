"""Keras' configs of GPTQ and AWQ, as a scheme, a method and batches."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import numpy as np

from ...core import INT2, INT3, INT4, INT8, ArrayConfig, Scheme
from ...methods import AWQ, GPTQ
from .. import compat

_GPTQConfig: Any = keras.quantizers.GPTQConfig
# Keras 3.13 does not have it.
_AWQConfig: Any = getattr(keras.quantizers, "AWQConfig", None)
_FORMATS = {2: INT2, 3: INT3, 4: INT4, 8: INT8}


class Calibration(NamedTuple):
    """Arguments of `jaxquant.keras.quantize`."""

    rules: Scheme
    method: Any
    batches: list[Any]


def _gptq(config: Any) -> GPTQ:
    # Keras allows a damping of 0, with which a Cholesky factor may not exist.
    damping = max(config.hessian_damping, 1e-6)
    return GPTQ(damping=damping, act_order=config.activation_order)


_METHODS: dict[Any, Callable[[Any], Any]] = {_GPTQConfig: _gptq}
if _AWQConfig is not None:
    _METHODS[_AWQConfig] = lambda config: AWQ(grid=config.num_grid_points)
STOCK_METHODS = tuple(_METHODS)


def check_alone(method: Any, batches: Any) -> None:
    """Checks that neither is given beside a config of Keras.

    Raises:
        ValueError: one of them is.
    """
    if method is not None or batches is not None:
        raise ValueError(
            "A GPTQConfig or AWQConfig of Keras has its own method and data set; got "
            f"method={method!r} and batches of {type(batches).__name__} beside it. Pass a scheme "
            "such as jq.W4A16 in its place, or leave both out."
        )


def calibration_of(config: Any, model: Any) -> Calibration:
    """The scheme, method and batches that a config of Keras stands for.

    A config that an interrupted `Model.quantize` changed gets back what it held.

    Raises:
        ValueError: the data set has fewer tokens than one sequence, or the model has inputs that
            cannot be made from tokens.
    """
    earlier = compat.nothing_to_calibrate(config)
    if earlier is not None:
        earlier.restore()  # That run of `Model.quantize` ended with an error.
    make = next(make for kind, make in _METHODS.items() if isinstance(config, kind))
    size = config.group_size
    weights = ArrayConfig(
        format=_FORMATS[config.weight_bits],
        group_size=None if size == -1 else size,
        symmetric=getattr(config, "symmetric", False),
    )
    rows = sequences(config)
    return Calibration(Scheme(weights), make(config), [_inputs(model, row[None]) for row in rows])


def sequences(config: Any) -> np.ndarray:
    """(num_samples, sequence_length) tokens, at equal distances in the data set."""
    tokenize = getattr(config.tokenizer, "tokenize", config.tokenizer)
    parts = [tokenize(x) if isinstance(x, str) else x for x in _items(config.dataset)]
    tokens = np.concatenate([np.asarray(part).reshape(-1) for part in parts] or [np.zeros(0)])
    length = config.sequence_length
    if len(tokens) < length:
        raise ValueError(
            f"The data set must have at least one sequence of {length} tokens; got {len(tokens)} "
            "tokens. Pass more text, or a smaller sequence_length."
        )
    last = len(tokens) - length
    count = min(config.num_samples, last + 1)
    starts = np.linspace(0, last, count).round().astype(int)
    return np.stack([tokens[start : start + length] for start in starts]).astype(np.int32)


def _items(dataset: Any) -> Iterable[Any]:
    return [dataset] if isinstance(dataset, str) else dataset


# What models of KerasHub are called with, by the names of their inputs.
_INPUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "token_ids": lambda tokens: tokens,
    "padding_mask": np.ones_like,
    "segment_ids": np.zeros_like,
    "position_ids": lambda tokens: np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape),
}


def _inputs(model: Any, tokens: np.ndarray) -> Any:
    """What the model is called with: tokens, or a dict of them and masks."""
    wanted = model.input if compat.is_functional(model) else None
    if not isinstance(wanted, dict):
        return tokens
    odd = [name for name in wanted if name not in _INPUTS]
    if odd:
        raise ValueError(
            f"The inputs of model {model.name!r} must be of {', '.join(_INPUTS)}; got {odd}. Pass "
            "method=jq.methods.GPTQ() and batches=[inputs, ...] to jaxquant.keras.quantize."
        )
    return {name: _INPUTS[name](tokens) for name in wanted}
