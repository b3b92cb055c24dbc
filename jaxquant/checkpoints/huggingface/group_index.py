"""Groups of columns in any order ("act-order"): which group each column belongs to."""

import numpy as np

from ..source import Index, Source
from .derived import computed
from .mapped import Tensor


def permutation_of(index: Tensor, size: int) -> np.ndarray | None:
    """The columns sorted by group, int32; None if they are in order already.

    Args:
        index: int32 (K,), the group of each column; or -1 in each place, for ordered columns.
        size: columns of a group; the last may have fewer.

    Raises:
        ValueError: a group has another number of columns.
    """
    (length,) = index.shape
    found = index.source.read()
    ordered = np.arange(length) // size
    if np.array_equal(found, ordered) or np.all(found == -1):
        return None
    if not np.array_equal(np.sort(found), ordered):
        wanted = f"the group of each column, with {size} columns in each group"
        raise index.invalid(wanted, np.array2string(found, threshold=20))
    return np.argsort(found, kind="stable").astype(np.int32)


def permuted(source: Source, axis: int, permutation: np.ndarray) -> Source:
    """The elements along an axis in another order: element k is `permutation[k]` of the source."""
    axis %= source.ndim

    def reader(index: Index) -> np.ndarray:
        chosen = permutation[index[axis]]
        first, stop = (int(chosen.min()), int(chosen.max()) + 1) if chosen.size else (0, 0)
        part = source.read((*index[:axis], slice(first, stop), *index[axis + 1 :]))
        return np.take(part, chosen - first, axis)

    return Source(source.shape, source.dtype, reader)


def as_source(permutation: np.ndarray | None) -> Source | None:
    """The permutation as a Source."""
    if permutation is None:
        return None
    return computed(permutation.shape, permutation.dtype, lambda: permutation)
