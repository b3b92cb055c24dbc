"""Reads int4 weights in the file format of stock Keras 3.14 and later.

Keras flattens a weight to a matrix, and packs two codes to a byte along its columns, the first in
the low bits. Entries: packed codes; the layer's other variables; then for one scale per channel

    scale                    weight = codes / scale

and for groups, where `g_idx` has the group of each row (of each column in a table)

    scale, zero, g_idx       weight = (codes - zero) * scale
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...core import QTensor, blocks_between, unpack_int4
from ..configs import Int4QuantizationConfig


class StockMatrix(NamedTuple):
    """How stock Keras flattens a weight for int4.

    Attributes:
        shape: rows and columns; a plain reshape of the weight.
        axis: the axis of the matrix along which groups run.
    """

    shape: tuple[int, int]
    axis: int

    @property
    def packed(self) -> tuple[int, int]:
        """Shape of the packed codes."""
        rows, columns = self.shape
        return rows, -(-columns // 2)


class StockInt4(NamedTuple):
    """One weight of a file, with a scale and a zero point for each element of its matrix.

    Attributes:
        codes: (rows, columns), int8.
        scale: (rows, columns), float32, the step.
        zero: (rows, columns), int8; None for one scale per channel.
        config: the jaxquant config with these groups.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    config: Int4QuantizationConfig


def is_int4(codes: np.ndarray, shape: tuple[int, ...], matrix: StockMatrix) -> bool:
    """Whether the first entry of a stock file holds int4 codes of a weight of this shape.

    Codes of a single column have the same shape packed and unpacked. But packed codes leave the
    high bits zero, whereas at least one int8 code is 127 or -127.
    """
    return codes.shape == matrix.packed and (codes.shape != shape or has_low_bits_only(codes))


def has_low_bits_only(codes: np.ndarray) -> bool:
    """Whether the high bits of all bytes are zero, but not all bytes."""
    return bool(np.any(codes)) and not np.any(codes.view(np.uint8) >> 4)


def read_int4(
    where: str, codes: np.ndarray, rest: list[np.ndarray], matrix: StockMatrix
) -> StockInt4:
    """Reads one weight.

    Args:
        where: how errors refer to it.
        codes: the packed entry.
        rest: the entries after the layer's other variables.
        matrix: how it is flattened.

    Raises:
        ValueError: the entries are not those of Keras, or groups are not consecutive rows.
    """
    rows = matrix.shape[matrix.axis]
    other = matrix.shape[1 - matrix.axis]
    group = rest[2].astype(np.int64) if len(rest) == 3 else np.zeros(rows, np.int64)
    size = int(np.sum(group == 0)) if group.shape == (rows,) else 0
    if size == 0 or not np.array_equal(group, np.arange(rows) // size):
        raise ValueError(
            f"{where} must have int4 groups of consecutive rows, in `g_idx` of {rows} elements; "
            f"got shape {group.shape}, {group[:4]}... Quantize it again from float weights."
        )
    groups = [other, other]
    groups[matrix.axis] = int(group[-1]) + 1
    wanted = [tuple(groups)] * 2 if len(rest) == 3 else [(other,)]
    found = [x.shape for x in rest[:2]]
    if found != wanted:
        raise ValueError(
            f"{where} must have an int4 scale (and zero point) of shapes {wanted}; got {found}. "
            "Load the file into the layer that it was saved from."
        )
    whole = np.asarray(unpack_int4(jnp.asarray(codes), matrix.shape[1], axis=1))
    scale = rest[0].astype(np.float32)
    if len(rest) == 1:
        step = np.broadcast_to(np.expand_dims(1 / scale, matrix.axis), matrix.shape)
        return StockInt4(whole, step, None, Int4QuantizationConfig(block_size=None))
    step, zero = (np.take(x, group, axis=matrix.axis) for x in (scale, rest[1]))
    return StockInt4(whole, step, zero, Int4QuantizationConfig(block_size=size))


def as_tensor(where: str, held: StockInt4, shape: tuple[int, ...], like: QTensor) -> QTensor:
    """The weight of `shape` as a QTensor like `like`, which is in logical order.

    Raises:
        ValueError: one group of `like` spans several groups of Keras.
    """
    widths = [(0, n - m) for n, m in zip(like.shape, shape, strict=True)]
    groups = tuple(like.scale.shape)
    zero = np.zeros(held.codes.shape, np.int8) if held.zero is None else held.zero
    scales, zeros = (np.pad(x.reshape(shape), widths, "edge") for x in (held.scale, zero))
    codes = np.pad(held.codes.reshape(shape), widths)
    firsts = [_first_of(x, groups) for x in (scales, zeros)]
    pairs = zip(firsts, (scales, zeros), strict=True)
    if not all(np.array_equal(repeat_groups(x, like.shape), y, equal_nan=True) for x, y in pairs):
        size = held.config.block_size or held.codes.shape[0]
        ours = blocks_between(like.shape, groups)
        raise ValueError(
            f"{where} has int4 groups of {size} rows of the matrix {held.codes.shape} that Keras "
            f"reshapes the weight {shape} to; no groups of shape {ours} in the weight can "
            "represent them. Load a file in float or int8 instead, and quantize here."
        )
    parts = [codes, firsts[0]] + [firsts[1]] * (held.zero is not None)
    leaves, treedef = jax.tree.flatten(like)
    typed = [jnp.asarray(x).astype(leaf.dtype) for x, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(treedef, typed)


def _first_of(x: np.ndarray, groups: tuple[int, ...]) -> np.ndarray:
    """The first element of each group."""
    return x[tuple(slice(None, None, b) for b in blocks_between(x.shape, groups))]


def repeat_groups(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Repeats one element per group to one per element of an array of `shape`."""
    for axis, block in enumerate(blocks_between(shape, x.shape)):
        x = np.repeat(x, block, axis)
    return x


def is_float8(shapes: list[tuple[int, ...]], count: int) -> bool:
    """Whether a file of these shapes has the scales of float8 training after `count` others."""
    pairs = shapes[count:]
    lengths = set(pairs[1::2])
    return len(pairs) == 6 and set(pairs[::2]) == {()} and len(lengths) == 1
