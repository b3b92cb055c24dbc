"""Leaves that belong together, found by patterns whose wildcards match the same text."""

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

from .rules import REGEX

# Axes as a user gives them: one, or several that are flattened in their order.
FoldAxes = int | tuple[int, ...]
Pattern = str | tuple[str, FoldAxes]
# What the wildcards of a pattern match: the name of a layer.
Key = tuple[str, ...]
Matched = list[tuple[Key, str, FoldAxes]]


def matched(patterns: Pattern | Sequence[Pattern], axis: FoldAxes, paths: Sequence[str]) -> Matched:
    """(key, path, axes) of all leaves that the patterns match.

    Args:
        patterns: one or several; a pair is a pattern and the axis of its leaves.
        axis: of the leaves of other patterns.
        paths: of all leaves.

    Raises:
        ValueError: a pattern is not as above, matches no leaf, or one that another has matched.
    """
    found: Matched = []
    for item in _as_list(patterns):
        pattern, axes = item if isinstance(item, tuple) else (item, axis)
        keys = [(re.fullmatch(_expression(pattern), path), path) for path in paths]
        new: Matched = [(m.groups(), path, axes) for m, path in keys if m is not None]
        if not new:
            raise ValueError(
                f"{pattern!r} matches no leaf; got {', '.join(list(paths)[:8])}, ... Patterns are "
                "globs over the whole path, as in Rule."
            )
        found += new
    twice = [path for _, path, _ in found]
    repeated = [path for path in dict.fromkeys(twice) if twice.count(path) > 1]
    if repeated:
        raise ValueError(
            f"Patterns must match a leaf once; got {repeated[0]} twice in {patterns!r}."
        )
    return found


def paired(sources: Matched, targets: Matched) -> list[tuple[Matched, Matched]]:
    """The sources and the targets of each layer, by what the wildcards of their patterns match.

    Sources without wildcards have all targets.

    Raises:
        ValueError: a source has no target, or a target no source.
    """
    keys = list(dict.fromkeys(key for key, _, _ in sources))
    if keys == [()]:
        return [(sources, targets)]
    pairs = []
    for key in keys:
        mine = [t for t in targets if t[0] == key]
        own = [s for s in sources if s[0] == key]
        if not mine:
            raise ValueError(
                f"{own[0][1]} has no target whose wildcards match the same, {key}; got "
                f"{', '.join(path for _, path, _ in targets[:4])}. Write the pattern of the source "
                "with the wildcards of its targets."
            )
        pairs.append((own, mine))
    alone = [path for key, path, _ in targets if key not in keys]
    if alone:
        raise ValueError(
            f"{alone[0]} has no source whose wildcards match the same; got "
            f"{', '.join(path for _, path, _ in sources[:4])}. Exclude it from the targets."
        )
    return pairs


def _as_list(patterns: Any) -> list[Pattern]:
    items = [patterns] if _is_pattern(patterns) else patterns
    for item in items:
        if not _is_pattern(item):
            raise ValueError(
                "A pattern must be a str, or a pair of a str and the axis of its leaves, such as "
                f'("*/up/kernel", -1); got {item!r}.'
            )
    return list(items)


def _is_pattern(x: Any) -> bool:
    if not isinstance(x, tuple):
        return isinstance(x, str)
    is_pair = len(x) == 2 and isinstance(x[0], str)
    axes = x[1] if is_pair and isinstance(x[1], tuple) else x[1:]
    return is_pair and all(isinstance(a, int) for a in axes)


def _expression(pattern: str) -> str:
    """The regular expression of a glob, with a group for each wildcard."""
    if pattern.startswith(REGEX):
        return pattern[len(REGEX) :]
    # fnmatch.translate returns (?s:...)\Z.
    return "(.*)".join(fnmatch.translate(part)[4:-3] for part in re.split(r"\*+", pattern))
