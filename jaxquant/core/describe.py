"""Short descriptions of quantized arrays, for reports and errors."""

import math

from .low_rank import LowRank
from .qtensor import Inputs, QTensor


def describe(q: QTensor | LowRank) -> str:
    """Describes how an array is quantized, such as "int4 g128 asymmetric, int8 inputs".

    Example:
        >>> config = jq.ArrayConfig(format=jq.INT4, group_size=32, symmetric=False)
        >>> jq.tree.describe(jq.quantize(jnp.ones((64, 8)), config))
        'int4 g32 asymmetric'
    """
    if isinstance(q, LowRank):
        return f"{describe(q.base)}, adapters of rank {q.rank}"
    text = _words(q, "per channel" if math.prod(q.scale.shape) > 1 else "per tensor")
    inputs = _words_of_inputs(q.inputs)
    return f"{text}, {inputs}" if inputs else text


def _words_of_inputs(inputs: Inputs | None) -> str:
    """Such as "int8 inputs rotated in blocks of 64"; empty for float activations as they are."""
    config, rotation = (inputs.config, inputs.rotation) if inputs else (None, None)
    kind = f"{config.format} inputs" if config else "inputs"
    if rotation is not None:
        return f"{kind} rotated in blocks of {rotation.block}"
    return kind if config else ""


def describe_inputs(q: QTensor) -> str:
    """Describes how activations are quantized, such as "int8" or "int8 g32"."""
    return _words(q, "")


def _words(q: QTensor, ungrouped: str) -> str:
    counts = [q.scale.shape[a] for a in q.stored_axes(range(q.ndim))]
    blocks = [n // c for n, c in zip(q.shape, counts, strict=True) if 0 < c < n]
    is_grouped = any(1 < c < n for n, c in zip(q.shape, counts, strict=True))
    kind = "g" + "x".join(map(str, blocks)) if is_grouped else ungrouped
    asymmetric = "asymmetric" if q.zero_point is not None else ""
    offset = "with offset" if q.offset is not None else ""
    return " ".join(filter(None, (str(q.format), kind, asymmetric, offset)))
