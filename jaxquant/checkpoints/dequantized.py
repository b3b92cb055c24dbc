"""Quantized tensors of a checkpoint as arrays of floats, dequantized slice by slice."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from ..core import QTensor
from .source import Index, Source


def dequantized(name: str, q: QTensor) -> Source:
    """What a QTensor of Sources dequantizes to. Only the blocks that a slice needs are read.

    Raises:
        ValueError: it stands for another array than its dequantized values.
    """
    field = None if q.inputs is None else q.inputs.changing_field
    if field is not None:
        raise ValueError(
            f"{name} cannot be quantized again: its inputs.{field} would be lost; got {q!r}. Give "
            "it a rule with None, which copies it."
        )
    stored = dataclasses.replace(q, inputs=None)
    axes = q.stored_axes(range(q.ndim))
    blocks = _block_shape(stored)

    def reader(index: Index) -> np.ndarray:
        asked = [index[axes.index(a)] for a in range(q.ndim)]
        whole = [
            slice(s.start // b * b, -(-s.stop // b) * b) for s, b in zip(asked, blocks, strict=True)
        ]
        part = jax.tree.map(lambda x: _part(x, whole, stored.codes.shape), stored)
        values = np.asarray(part.dequantize())
        starts = (whole[a].start for a in axes)
        inside = (slice(s.start - b, s.stop - b) for s, b in zip(index, starts, strict=True))
        return values[tuple(inside)].copy()

    return Source(q.shape, np.dtype(q.dtype), reader)


def _block_shape(q: QTensor) -> list[int]:
    """Elements along each stored axis that share a scale at any level; 1 where all do."""
    shapes = [x.shape for x in jax.tree.leaves(q)]
    lengths = zip(q.codes.shape, *shapes, strict=True)
    return [math.lcm(*(length // n for n in counts if n > 1), 1) for length, *counts in lengths]


def _part(x: Source, index: list[slice], shape: tuple[int, ...]) -> jax.Array:
    """The part of codes or scales that belongs to a part of the codes."""
    parts = []
    for s, n, length in zip(index, x.shape, shape, strict=True):
        block = length // n if n else 1
        parts += [slice(0, n) if n == 1 else slice(s.start // block, s.stop // block)]
    return jnp.asarray(x.read(parts))
