"""Layers to quantize: rows of the table-driven test. A new layer needs one row."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxquant.keras import layers


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """One layer with its input.

    Attributes:
        name: what the test is called.
        make: keyword arguments such as dtype -> the layer, with biases that are not zero.
        input_shape: of one example.
        inputs: (rng, shape with the batch) -> the inputs.
        products: how many products follow each other, whose errors add up as squares.
    """

    name: str
    make: Callable[..., Any]
    input_shape: tuple[int, ...]
    inputs: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] = lambda rng, shape: (
        rng.normal(size=shape).astype(np.float32)
    )
    products: int = 1


def tokens(rng, shape):
    return rng.integers(0, 40, shape).astype(np.int32)


CORE = [
    LayerCase(
        "Dense",
        lambda **kw: layers.Dense(33, activation="tanh", bias_initializer="normal", **kw),
        (200,),
    ),
    LayerCase(
        "EinsumDense",
        lambda **kw: layers.EinsumDense(
            "abc,cde->abde", (5, 3, 7), bias_axes="de", bias_initializer="normal", **kw
        ),
        (5, 150),
    ),
    LayerCase(
        "EinsumDense two contracted",
        lambda **kw: layers.EinsumDense("abcd,cde->abe", (5, 9), **kw),
        (5, 3, 66),
    ),
    LayerCase(
        "EinsumDense ellipsis", lambda **kw: layers.EinsumDense("...x,xy->...y", 24, **kw), (5, 40)
    ),
    LayerCase("Embedding", lambda **kw: layers.Embedding(40, 150, **kw), (6,), tokens),
]
