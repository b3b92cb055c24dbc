"""Where the blocks that share a scale lie after an array was reshaped. Integers only."""

import itertools
import math
from collections.abc import Sequence

Lengths = Sequence[int]


def reshaped_blocks(source: Lengths, blocks: Lengths, target: Lengths) -> tuple[int, ...] | None:
    """The block shape of a reshaped array, or None if its blocks are not boxes any more.

    Args:
        source: shape before, of positive lengths.
        blocks: block shape before.
        target: shape after.
    """
    found: list[int] = []
    for these, those in paired_axes(source, target):
        before, after = [source[a] for a in these], [target[a] for a in those]
        block = _reshaped_run(before, [blocks[a] for a in these], after)
        if block is None:
            return None
        found += block
    return tuple(found)


def _reshaped_run(source: list[int], blocks: list[int], target: list[int]) -> list[int] | None:
    if all(block == 1 for block in blocks):
        return [1] * len(target)
    if blocks == source:
        return target
    pieces = _pieces(source, target)
    if pieces is None:
        return None
    before, after = pieces
    split = [_split(block, lengths) for block, lengths in zip(blocks, before, strict=True)]
    if None in split:
        return None
    parts = iter([part for s in split for part in s or ()])
    merged = [_merge(lengths, [next(parts) for _ in lengths]) for lengths in after]
    found = [block for block in merged if block is not None]
    return found if len(found) == len(merged) else None


def paired_axes(source: Lengths, target: Lengths) -> list[tuple[range, range]]:
    """Runs of axes of two shapes of one size that hold equally many elements, the shortest ones.

    Axes of length 1 at the end belong to the last run.
    """
    runs, i, j = [], 0, 0
    while i < len(source) or j < len(target):
        first, second = i, j
        left = right = 1
        while i == first or j == second or left != right:
            if (left <= right and i < len(source)) or j == len(target):
                left *= source[i]
                i += 1
            else:
                right *= target[j]
                j += 1
            if i == len(source) and j == len(target):
                break
        if runs and (first == i or second == j):
            (first, _), (second, _) = ((run.start, run.stop) for run in runs.pop())
        runs.append((range(first, i), range(second, j)))
    return runs


def _pieces(source, target):
    """Both runs of axes divided into the same pieces: for each axis the lengths of its pieces."""
    ends = {1} | set(_suffix_products(source)) | set(_suffix_products(target))
    cuts = sorted(ends)
    if any(after % before for before, after in itertools.pairwise(cuts)):
        return None
    return _cut(source, cuts), _cut(target, cuts)


def _suffix_products(lengths):
    return itertools.accumulate(reversed(lengths), lambda a, b: a * b)


def _cut(lengths, cuts):
    """For each axis the lengths of its pieces, between the cuts."""
    found, inner = [], 1
    for length in reversed(lengths):
        within = [c for c in cuts if inner <= c <= inner * length]
        found.append([after // before for before, after in itertools.pairwise(within)][::-1])
        inner *= length
    return found[::-1]


def _split(block, lengths):
    """The block lengths of the pieces of an axis, or None."""
    found = []
    for length in reversed(lengths):
        part = math.gcd(block, length)
        # A block that ends within a piece has to divide it; one that goes on has to hold it whole.
        if block not in (part, 1) and part != length:
            return None
        found.append(part)
        block //= part
    return found[::-1]


def _merge(lengths, parts):
    """The block length of an axis made of pieces, or None."""
    block, is_whole = 1, True
    for length, part in zip(reversed(lengths), reversed(parts), strict=True):
        if not is_whole and part != 1:
            return None
        block *= part
        is_whole = is_whole and part == length
    return block
