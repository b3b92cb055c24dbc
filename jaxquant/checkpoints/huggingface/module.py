"""The tensors of a folder, taken module by module until only plain arrays are left."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from ...core import FP8_E4M3, ArrayConfig, Format, Inputs, QTensor
from ..source import Index, Source
from ..stored import Stored
from .derived import converted, refined, reshaped, viewed
from .folder import Folder
from .mapped import Tensor

FLOATS = ("float32", "float16", "bfloat16")
E8M0 = ("uint8", "float8_e8m0fnu")


class Pool:
    """The tensors of a folder that are not yet part of a quantized weight."""

    def __init__(self, folder: Folder):
        self.folder = folder
        self.rest: dict[str, Tensor] = dict(folder.tensors)

    def modules(self, *suffixes: str) -> Iterator["Module"]:
        """Each module that has a tensor with one of the suffixes: "weight" finds "a.b.weight"."""
        for name in self.folder.tensors:
            suffix = next((s for s in suffixes if name.endswith(s)), "")
            prefix = name.removesuffix(suffix)
            if suffix and name in self.rest and (not prefix or prefix.endswith(".")):
                yield Module(self, prefix)


class Module:
    """The tensors whose names start alike, such as those of one linear layer."""

    def __init__(self, pool: Pool, prefix: str):
        self.pool = pool
        self.prefix = prefix
        self.taken: list[Tensor] = []

    def __contains__(self, suffix: str) -> bool:
        return self.prefix + suffix in self.pool.rest

    def take(self, suffix: str) -> Tensor | None:
        """The tensor with a suffix, which is then part of this module's weight; or None."""
        tensor = self.pool.rest.pop(self.prefix + suffix, None)
        self.taken += [] if tensor is None else [tensor]
        return tensor

    def need(self, suffix: str) -> Tensor:
        """`take`, for a tensor that must be there."""
        tensor = self.take(suffix)
        if tensor is None:
            raise self.invalid(f"has no tensor {self.prefix + suffix!r}")
        return tensor

    def invalid(self, text: str) -> ValueError:
        """An error about the module, as a whole or about its last tensor."""
        if not self.taken:
            return ValueError(f"{self.pool.folder.path}: {self.prefix!r} {text}.")
        first, last = self.taken[0], self.taken[-1]
        return ValueError(
            f"{last.path}: the module of {first.name!r} {text}. Convert the model again."
        )

    def stored(
        self,
        kind: str,
        format: Format,
        *,
        suffix: str = "weight",
        note: str = "",
        dtype: Any = None,
        order: tuple[int, ...] | None = None,
        **parts: Any,
    ) -> Stored:
        """The quantized weight, with the bytes of all that was taken.

        Args:
            kind: name of the type in the file.
            format: of the codes.
            suffix: that the prefix of the module is followed by in the unquantized model.
            note: why the weight is not exact; empty if it is.
            dtype: that it dequantizes to; None for that of the model.
            order: in which the axes are stored.
            parts: Sources and Inputs, by the field of the QTensor.
        """
        dtype = self.pool.folder.dtype if dtype is None else dtype
        value = QTensor(**parts, format=format, dtype=dtype, order=order)
        nbytes = sum(t.nbytes for t in self.taken)
        return Stored(self.prefix + suffix, kind, value, nbytes, note)


def scale_of(
    module: Module, scale: Tensor, shape: tuple[int, ...], blocks: tuple[int, ...]
) -> Source:
    """Scales as a QTensor has them: the last block along an axis may be shorter in the file.

    Args:
        module: that the scale is part of.
        scale: one element per block. Axes of length 1 may be missing.
        shape: of the weight.
        blocks: block shape.

    Raises:
        ValueError: the scale has another shape.
    """
    grid = grid_of(shape, blocks)
    if squeezed(scale.shape) != squeezed(grid):
        raise scale.invalid(f"of shape {grid}, for a weight of shape {shape}")
    return refined(reshaped(scale.source, grid), shape, blocks)


def grid_of(shape: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, ...]:
    """How many blocks there are along each axis, of which the last may be shorter."""
    return tuple(-(-n // b) for n, b in zip(shape, blocks, strict=True))


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without axes of length 1."""
    return tuple(n for n in shape if n != 1)


def check_matrix(tensor: Tensor, ndim: tuple[int, ...] = (2,)) -> Tensor:
    """The tensor, if it is a matrix with elements (or a stack of matrices, by its rank)."""
    if len(tensor.shape) not in ndim or not math.prod(tensor.shape):
        raise tensor.invalid(f"an array of {' or '.join(map(str, ndim))} axes with elements")
    return tensor


def as_e8m0(scale: Tensor) -> Source:
    """Exponents stored as bytes, as powers of two."""
    return viewed(scale.check(E8M0).source, ml_dtypes.float8_e8m0fnu)


def as_float4(codes: Source) -> Source:
    """Codes of 4 bits in bytes as float4_e2m1fn."""
    return viewed(codes, ml_dtypes.float4_e2m1fn)


def shifted(codes: Source, minus: int, dtype: Any) -> Source:
    """Unsigned codes (uint8) minus an integer, in a dtype that has room for the result."""
    # NumPy stores an element of int4 in a byte, with its sign extended.
    return converted(codes, dtype, lambda x: (x - np.uint8(minus)).view(dtype))


def guarded(source: Source, check: Any) -> Source:
    """A Source that first calls `check(index)`, which raises if what is read cannot be trusted."""

    def reader(index: Index) -> np.ndarray:
        check(index)
        return source.read(index)

    return Source(source.shape, source.dtype, reader)


def factors_of(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, as scales have it, of one factor for all matrices of a stack or one for each."""
    *batch, _, _ = shape
    if tensor.source.size == 1:
        return (1,) * len(shape)
    if squeezed(tensor.shape) != squeezed(tuple(batch)):
        raise tensor.invalid(f"one factor, or one for each matrix of {shape}")
    return (*batch, 1, 1)


def nested_scale(inner: Source, outer: Source) -> QTensor:
    """Scales of 8-bit floats under float32 scales."""
    arrays: Any = {"codes": inner, "scale": outer}
    return QTensor(**arrays, format=FP8_E4M3, dtype=np.dtype(np.float32))


def scalar(tensor: Tensor | None) -> Source | None:
    """The only element of a tensor, as a Source without axes."""
    if tensor is None:
        return None
    if tensor.source.size != 1:
        raise tensor.invalid("one element")
    return reshaped(tensor.source, ())


def with_scale(config: ArrayConfig, scale: Source, zero_point: Source | None = None) -> Inputs:
    """Inputs whose scale was calibrated."""
    parts: Any = {"scale": scale, "zero_point": zero_point}
    return Inputs(config, **parts)


def with_permutation(inputs: Inputs | None, permutation: Source | None) -> Inputs | None:
    """Inputs that are permuted first."""
    if permutation is None:
        return inputs
    return dataclasses.replace(inputs or Inputs(), permutation=permutation)
