"""Arrays in files, which are read slice by slice when they are needed."""

import dataclasses
import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Index = tuple[slice, ...]
# Smaller reads are not worth a system call.
_LEAST_RELEASED = 2**20


@dataclasses.dataclass(frozen=True)
class Source:
    """An array in a file. It stands in the place of an array in a QTensor: a leaf.

    Attributes:
        shape: of the array.
        dtype: of the array, perhaps one that JAX adds to NumPy, such as uint4.
        reader: returns a copy of the part that an index selects: one slice per axis, each with
            start and stop within the shape, and step 1.
        mapped: the part of a mapped file that it reads, if it does. Its pages are released after
            each read: a process does not hold what it has read.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    reader: Callable[[Index], np.ndarray]
    mapped: np.ndarray | None = None

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self, index: Sequence[slice] | None = None) -> np.ndarray:
        """A copy of the part that the slices select, of step 1; the whole array for None.

        Raises:
            ValueError: the file became shorter after it was opened.
        """
        given = (slice(None),) * self.ndim if index is None else index
        bounds = (s.indices(n)[:2] for s, n in zip(given, self.shape, strict=True))
        if self.mapped is not None:
            _check_length(self.mapped)
        out = self.reader(tuple(slice(start, max(start, stop)) for start, stop in bounds))
        if self.mapped is not None and out.nbytes >= _LEAST_RELEASED:
            _release(self.mapped)
        return out

    def part(self, start: int, stop: int) -> "Source":
        """The part from `start` to `stop` along the first axis."""

        def reader(index: Index) -> np.ndarray:
            first, *rest = index
            return self.read((slice(start + first.start, start + first.stop), *rest))

        return Source((stop - start, *self.shape[1:]), self.dtype, reader)

    def repeat(self, times: int, axis: int) -> "Source":
        """The array with each element repeated along an axis, as it is read."""

        def reader(index: Index) -> np.ndarray:
            start, stop = index[axis].start, index[axis].stop
            first = start // times
            found = self.read((*index[:axis], slice(first, -(-stop // times)), *index[axis + 1 :]))
            skipped = start - first * times
            return found.repeat(times, axis).take(range(skipped, skipped + stop - start), axis)

        shape = (*self.shape[:axis], times * self.shape[axis], *self.shape[axis + 1 :])
        return Source(shape, self.dtype, reader)

    def put(self, sharding: jax.sharding.Sharding | None = None) -> jax.Array | np.ndarray:
        """The array on devices. Each process reads its devices' slices, one at a time.

        A 64-bit array stays a NumPy array unless 64-bit types are enabled, since JAX would truncate
        it.
        """
        if jax.dtypes.canonicalize_dtype(self.dtype) != self.dtype:
            return self.read()
        if sharding is None:
            return jnp.asarray(self.read())
        last: list[tuple[Index, np.ndarray]] = []

        def read(index: Index | None) -> np.ndarray:
            index = index or ()
            # Devices that hold copies of one slice are asked for one after another.
            if not last or last[0][0] != index:
                last[:] = [(index, self.read(index))]
            return last[0][1]

        return jax.make_array_from_callback(self.shape, sharding, read, dtype=self.dtype)


def _mapping(array: np.ndarray) -> mmap.mmap | None:
    """The mapping that an array is a view of."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


def _check_length(mapped: np.ndarray) -> None:
    mapping = _mapping(mapped)
    # Reading pages beyond the end of a file would end the process.
    if mapping is not None and mapping.size() < len(mapping):
        raise ValueError(
            f"{getattr(mapped, 'filename', None)} was truncated after it was opened, from "
            f"{len(mapping)} to {mapping.size()} bytes. Copy it again."
        )


def _release(mapped: np.ndarray) -> None:
    """Tells the system that the pages of a mapped file are not needed for now."""
    mapping = _mapping(mapped)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def concatenate(sources: Sequence[Source], axis: int) -> Source:
    """The arrays joined along an axis. Only the parts that lie in a slice are read for it."""
    first = sources[0]
    ends = np.cumsum([s.shape[axis] for s in sources]).tolist()
    shape = (*first.shape[:axis], ends[-1], *first.shape[axis + 1 :])

    def reader(index: Index) -> np.ndarray:
        start, stop = index[axis].start, index[axis].stop
        parts = []
        for source, end in zip(sources, ends, strict=True):
            begin = end - source.shape[axis]
            inside = slice(max(start, begin) - begin, min(stop, end) - begin)
            if inside.start < inside.stop:
                parts += [source.read((*index[:axis], inside, *index[axis + 1 :]))]
        if not parts:
            return np.zeros([s.stop - s.start for s in index], first.dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)

    return Source(shape, first.dtype, reader)


def stack(sources: Sequence[Source]) -> Source:
    """The arrays along a new first axis, such as the layers of a model for `jq.scan`."""
    first = sources[0]

    def reader(index: Index) -> np.ndarray:
        chosen, *rest = index
        parts = [s.read(rest) for s in sources[chosen]]
        return (
            np.stack(parts) if parts else np.zeros([s.stop - s.start for s in index], first.dtype)
        )

    return Source((len(sources), *first.shape), first.dtype, reader)
