"""Rules: which leaves of a tree are quantized, and how. The first rule that matches decides."""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from ..core import SCHEMES, ArrayConfig, Axes, Format, Scheme, bits_of, block_shape
from ..methods.internal import Chain, as_chain

REGEX = "re:"
# The contracted axis of kernels (K, N), as JAX and Keras have them, stacked or not.
CONTRACTED = -2


class Plan(NamedTuple):
    """How to quantize one leaf; see `Rule`."""

    scheme: Scheme
    axis: Axes
    method: Chain | None = None
    contracted: Axes = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """How to quantize the leaves whose path matches.

    Attributes:
        pattern: a glob over the whole path, in which `*` matches across "/" too; or "re:" and
            a regular expression that must match all of it.
        scheme: Scheme or ArrayConfig; None leaves the leaves in float.
        axis: the axis, or a tuple of axes, along which the elements of a leaf share a scale: its
            contracted axes. None for -2, that of a kernel (K, N), and in Keras for those that
            the layer declares.
        group_size: replaces the group size of the weights' config; None keeps it.
        where: (path, leaf) -> whether the rule applies to a matching leaf; None for all of them.
        required: whether it is an error if no leaf matches.
        note: reason that reports give for leaves left in float; None for the pattern.
        method: how `tree.quantize` chooses the codes, as its argument `method`; None for that one.
        contracted: all axes that products sum over, such as (0, 1) of an attention kernel (heads,
            size, N), so that codes are stored in the fastest order for that. None for `axis` if it
            is one axis, and to keep the order otherwise, as kernels of convolutions do. Blocks may
            lie along other axes, too.

    Raises:
        ValueError: the pattern is not a str, its regular expression cannot be compiled, the scheme
            is not a Scheme or ArrayConfig, the overrides contradict it, or the method is not one.

    Example:
        >>> rules = [jq.Rule("head/*", None), jq.Rule("*/kernel", jq.W8A8)]
        >>> params = {n: {"kernel": jnp.ones((32, 16))} for n in ("body", "head")}
        >>> quantized = jq.tree.quantize(params, rules)
        >>> jq.tree.describe(quantized["body"]["kernel"]), quantized["head"]["kernel"].dtype.name
        ('int8 per channel, int8 inputs', 'float32')
    """

    pattern: str
    scheme: Scheme | ArrayConfig | None
    axis: Axes = None
    group_size: int | tuple[int | None, ...] | None = None
    where: Callable[[str, Any], bool] | None = None
    required: bool = True
    note: str | None = None
    method: Any = None
    contracted: Axes = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise ValueError(
                f'A rule\'s pattern must be a str; got {self.pattern!r}. Write Rule("*/kernel", '
                "W8A8)."
            )
        if not isinstance(self.scheme, Scheme | ArrayConfig | None):
            raise ValueError(
                "A rule's scheme must be a Scheme, an ArrayConfig or None; got "
                f"{self.scheme!r}{advice_for(self.scheme)}."
            )
        try:
            re.compile(self._expression())
        except re.error as error:
            raise ValueError(
                f"A rule's pattern must be a glob, or {REGEX!r} and a regular expression; got "
                f"{self.pattern!r}: {error}."
            ) from error
        try:
            self.plan()
        except ValueError as error:
            raise ValueError(f"Rule {self.pattern!r}: {error}") from error

    def _expression(self) -> str:
        is_regex = self.pattern.startswith(REGEX)
        return self.pattern[len(REGEX) :] if is_regex else fnmatch.translate(self.pattern)

    def matches(self, path: str, leaf: Any) -> bool:
        """Whether the rule matches this leaf."""
        is_match = re.fullmatch(self._expression(), path) is not None
        return is_match and (self.where is None or self.where(path, leaf))

    def resolve(self) -> Scheme | None:
        """The scheme with the group size in place."""
        if self.scheme is None:
            return None
        scheme = self.scheme if isinstance(self.scheme, Scheme) else Scheme(self.scheme)
        if self.group_size is None:
            return scheme
        weights = dataclasses.replace(scheme.weights, group_size=self.group_size)
        return dataclasses.replace(scheme, weights=weights)

    def plan(self) -> Plan | None:
        """How to quantize a leaf, and along which axes; None to leave it unchanged."""
        scheme = self.resolve()
        method = None if self.method is None else as_chain(self.method)
        axis = CONTRACTED if self.axis is None else self.axis
        return scheme and Plan(scheme, axis, method, self.contracted)


class DefaultRule(Rule):
    """A rule of `default_rules`, which had to guess the axis."""


Rules = Scheme | ArrayConfig | Rule | Mapping[str, Any] | Sequence[Any]

# Norms match any part of the path, except "normal" and "normalized"; biases match its end.
_NORM = r"[^/.]*norm(?!al(?!i[sz]ation))[^/.]*|ln(_\w+|\d*|f)|rms(_\w+|\d*)"
_NORM_OR_BIAS = rf"re:(?i)(.*[/.])?({_NORM})([/.].*)?|(.*[/._])?(bias(_\w+)?|beta|gamma|scale)"
# Excludes kernels that embed patches or frames by a matrix multiplication.
_EMBEDDING = r"re:(?i)(?!.*kernel$).*(embed|wte|wpe).*"
_CONVOLUTION = r"re:(?i).*conv.*"


def is_matrix(path: str, leaf: Any) -> bool:
    """Whether a leaf is a floating-point array with two axes or more."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim > 1


def bits_per_weight(shape: tuple[int, ...], config: ArrayConfig, axis: Axes) -> float:
    """Bits that codes, scales and zero points take per element of an array of this shape.

    Raises:
        ValueError: as for `jaxquant.quantize`.
    """
    per_scale = max(math.prod(block_shape(shape, config, axis)), 1)
    bits = bits_of(config.stored_scale_dtype) + config.format.bits * (not config.symmetric)
    return config.format.bits + bits / per_scale


def default_rules(scheme: Scheme | ArrayConfig, axis: Axes = CONTRACTED) -> tuple[Rule, ...]:
    """Rules for matrices, embeddings and convolutions; norms and biases stay in float.

    Leaves are classified by their path. Norms and biases are recognized by name, so those of
    stacked layers, which have two axes, stay in float too. Embeddings ("embed", "wte" or "wpe")
    get one scale per row (axis -1), which a lookup gathers with the row, unless the scheme has
    blocks. Convolutions ("conv" and at least three axes) share scales along all axes except the
    output's, unless the scheme has groups. For all other leaves, the last two axes are treated as
    a matrix and leading axes as stacked layers: attention kernels with three axes, such as
    (K, heads, size), need an explicit rule. Leaves that would not shrink stay in float.

    Args:
        scheme: how to quantize all of them.
        axis: contracted axis of the matrices: -2 for kernels (K, N), as in JAX and Keras, -1 for
            (N, K), as in PyTorch.

    Example:
        >>> params = {"embed": jnp.ones((100, 32)), "norm": {"scale": jnp.ones(32)}}
        >>> quantized = jq.tree.quantize(params, jq.tree.default_rules(jq.W8A8))
        >>> quantized["embed"].scale.shape, quantized["norm"]["scale"].dtype.name
        ((100, 1), 'float32')
    """
    weights = scheme.weights if isinstance(scheme, Scheme) else scheme
    along_row = axis if isinstance(weights.group_size, tuple) else -1
    is_grouped = weights.group_size is not None or weights.format.group_size is not None
    output = 0 if axis == -1 else -1
    convolutions = [
        _default(_CONVOLUTION, scheme, tuple(a - n for a in range(n) if a != output % n), n)
        for n in (() if is_grouped or weights.per_tensor else (3, 4, 5))
    ]
    return (
        Rule(_NORM_OR_BIAS, None, required=False, note="a norm or bias, by its name"),
        _default(_EMBEDDING, scheme, along_row),
        *convolutions,
        _default("*", scheme, axis),
        Rule("*", None, where=is_matrix, required=False, note="it would not shrink"),
    )


def _default(
    pattern: str, scheme: Scheme | ArrayConfig, axis: Axes, ndim: int | None = None
) -> Rule:
    """A rule for matrices that would shrink, with `ndim` axes, or any number for None."""
    config = scheme.weights if isinstance(scheme, Scheme) else scheme

    def is_meant(path, leaf):
        return is_matrix(path, leaf) and ndim in (None, leaf.ndim) and shrinks(leaf, config, axis)

    return DefaultRule(pattern, scheme, axis=axis, where=is_meant, required=False)


def shrinks(leaf: Any, config: ArrayConfig, axis: Axes) -> bool:
    """Whether quantizing a leaf saves bits. True for invalid leaves, which raise later."""
    try:
        return bits_per_weight(leaf.shape, config, axis) < bits_of(leaf.dtype) or 0 in leaf.shape
    except ValueError:
        return True


def as_rules(rules: Rules) -> tuple[Rule, ...]:
    """Converts a scheme, a rule, {pattern: scheme} or a sequence of rules to a tuple of rules.

    Raises:
        ValueError: it is none of these, or empty, or an item is neither a Rule nor a
            (pattern, scheme).
    """
    if isinstance(rules, Scheme | ArrayConfig):
        return default_rules(rules)
    if isinstance(rules, Rule):
        return (rules,)
    items = rules.items() if isinstance(rules, Mapping) else rules
    if isinstance(items, str) or not hasattr(items, "__iter__"):
        raise ValueError(
            "rules must be a Scheme, an ArrayConfig, a Rule, a dict of pattern to scheme, or a "
            f"sequence of Rule; got {rules!r}{advice_for(rules)}."
        )
    found = tuple(_as_rule(item) for item in items)
    if not found:
        raise ValueError(f"rules must not be empty; got {rules!r}. Pass a Scheme or a Rule.")
    return found


def advice_for(value: object) -> str:
    """Advice for users who pass the name of a preset, or a format, instead of a preset."""
    if isinstance(value, Format):
        return ", a format; write jaxquant.ArrayConfig(format=...) with it"
    is_name = isinstance(value, str) and value in SCHEMES
    return f"; write jaxquant.SCHEMES[{value!r}]" if is_name else ""


def _as_rule(item: object) -> Rule:
    if isinstance(item, Rule):
        return item
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        return Rule(*item)
    raise ValueError(
        f"Each rule must be a Rule or a pair (pattern, scheme); got {item!r}. "
        'Write Rule("*/kernel", W8A8).'
    )


def match_rules(rules: tuple[Rule, ...], paths: list[str], leaves: list[Any]) -> list[Rule | None]:
    """The rule of each leaf: the first that matches, or None."""
    return [
        next((rule for rule in rules if rule.matches(path, leaf)), None)
        for path, leaf in zip(paths, leaves, strict=True)
    ]


def unused_rules(rules: tuple[Rule, ...], paths: list[str], leaves: list[Any]) -> list[Rule]:
    """Required rules that match no leaf, not even one that an earlier rule selects."""
    pairs = list(zip(paths, leaves, strict=True))
    return [r for r in rules if r.required and not any(r.matches(*pair) for pair in pairs)]
