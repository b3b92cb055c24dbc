"""Rules: which leaves of a tree are quantized, and how. The first rule that matches decides."""

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from ..core import ArrayConfig, Axes, Scheme

_REGEX = "re:"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the leaves whose path matches.

    Attributes:
        pattern: a glob over the whole path, in which `*` matches across "/" too; or "re:" and
            a regular expression that must match all of it.
        scheme: Scheme or ArrayConfig; None leaves the leaves as they are.
        axis: replaces the axis of the weights' config; None keeps it.
        group_size: replaces the group size of the weights' config; None keeps it.
        where: (path, leaf) -> whether a leaf whose path matches is meant; None means all.
        required: whether it is an error if no leaf matches.
        note: what a report says of leaves that the rule leaves as they are; None names the
            pattern.

    Raises:
        ValueError: the regular expression cannot be compiled, the scheme is none, or the
            overrides contradict it.
    """

    pattern: str
    scheme: Scheme | ArrayConfig | None
    axis: Axes = None
    group_size: int | tuple[int | None, ...] | None = None
    where: Callable[[str, Any], bool] | None = None
    required: bool = True
    note: str | None = None

    def __post_init__(self):
        if not isinstance(self.scheme, Scheme | ArrayConfig | None):
            raise ValueError(
                f"A rule's scheme must be a Scheme, an ArrayConfig or None; got {self.scheme!r}."
            )
        try:
            re.compile(self._expression())
        except re.error as error:
            raise ValueError(
                f"A rule's pattern must be a glob, or {_REGEX!r} and a regular expression; got "
                f"{self.pattern!r}: {error}."
            ) from error
        try:
            self.resolve()
        except ValueError as error:
            raise ValueError(f"Rule {self.pattern!r}: {error}") from error

    def _expression(self):
        is_regex = self.pattern.startswith(_REGEX)
        return self.pattern[len(_REGEX) :] if is_regex else fnmatch.translate(self.pattern)

    def matches(self, path: str, leaf: Any) -> bool:
        """Whether the rule is about this leaf."""
        is_match = re.fullmatch(self._expression(), path) is not None
        return is_match and (self.where is None or self.where(path, leaf))

    def resolve(self) -> Scheme | None:
        """The scheme with the overrides in place."""
        if self.scheme is None:
            return None
        scheme = self.scheme if isinstance(self.scheme, Scheme) else Scheme(self.scheme)
        overrides = {"axis": self.axis, "group_size": self.group_size}
        given = {k: v for k, v in overrides.items() if v is not None}
        return dataclasses.replace(scheme, weights=dataclasses.replace(scheme.weights, **given))


Rules = Scheme | ArrayConfig | Mapping[str, Any] | Sequence[Any]

# A norm by any part of the path, but not by "normal" or "normalized"; a bias by its end.
_NORM = r"[^/.]*norm(?!al(?!i[sz]ation))[^/.]*|ln(_\w+|\d*|f)"
_NORM_OR_BIAS = rf"re:(?i)(.*[/.])?({_NORM})([/.].*)?|(.*[/._])?(bias(_\w+)?|beta|gamma|scale)"
# Not the kernel of a product that embeds patches or frames.
_EMBEDDING = r"re:(?i)(?!.*kernel$).*(embed|wte|wpe).*"


def is_matrix(path: str, leaf: Any) -> bool:
    """Whether a leaf is floating and has two axes or more."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim > 1


def default_rules(scheme: Scheme | ArrayConfig, axis: Axes = None) -> tuple[Rule, ...]:
    """Rules for matrices and embeddings, which leave norms and biases as they are.

    Norms and biases are known by their names, so that those of stacked layers, which have two
    axes, are left too; embeddings by "embed", "wte" or "wpe" in their path, and get scales per
    row (axis -1), in which a lookup finds its scale, unless the scheme has blocks.

    Args:
        scheme: for all of them.
        axis: contracted axis of the matrices: -2 for kernels (K, N), as JAX and Keras have
            them, -1 for (N, K), as PyTorch has. None keeps that of the scheme.
    """
    weights = scheme.weights if isinstance(scheme, Scheme) else scheme
    along_row = None if isinstance(weights.group_size, tuple) else -1
    return (
        Rule(_NORM_OR_BIAS, None, required=False, note="a norm or bias, by its name"),
        Rule(_EMBEDDING, scheme, axis=along_row, where=is_matrix, required=False),
        Rule("*", scheme, axis=axis, where=is_matrix, required=False),
    )


def as_rules(rules: Rules) -> tuple[Rule, ...]:
    """Rules from what people write: one scheme, {pattern: scheme}, or a sequence of rules.

    Raises:
        ValueError: it is none of these, or an item is neither a Rule nor a (pattern, scheme).
    """
    if isinstance(rules, Scheme | ArrayConfig):
        return default_rules(rules)
    items = rules.items() if isinstance(rules, Mapping) else rules
    if isinstance(items, str) or not hasattr(items, "__iter__"):
        raise ValueError(
            "rules must be a Scheme, an ArrayConfig, a dict of pattern to scheme, or a sequence "
            f"of Rule; got {rules!r}."
        )
    return tuple(_as_rule(item) for item in items)


def _as_rule(item):
    if isinstance(item, Rule):
        return item
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        return Rule(*item)
    raise ValueError(
        f"Each rule must be a Rule or a pair (pattern, scheme); got {item!r}. "
        'Write Rule("*/kernel", W8A8).'
    )


def match(rules: tuple[Rule, ...], paths: list[str], leaves: list[Any]) -> list[Rule | None]:
    """The rule of each leaf: the first that matches, or None."""
    return [
        next((rule for rule in rules if rule.matches(path, leaf)), None)
        for path, leaf in zip(paths, leaves, strict=True)
    ]


def unused(rules: tuple[Rule, ...], paths: list[str], leaves: list[Any]) -> list[Rule]:
    """Required rules that match no leaf, whether or not an earlier rule took it."""
    pairs = list(zip(paths, leaves, strict=True))
    return [r for r in rules if r.required and not any(r.matches(*pair) for pair in pairs)]
