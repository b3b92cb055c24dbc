"""Rules that say which parameters are multiplied by which config in training."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from ..tree import Rule
from ..tree.internal import match_rules, unused_rules
from .product_config import ProductConfig

ProductRules = (
    ProductConfig | Mapping[str, ProductConfig | None] | Sequence[tuple[str, ProductConfig | None]]
)


class ProductRule(NamedTuple):
    """A pattern and what it selects; None leaves the products of these parameters in float."""

    rule: Rule
    config: ProductConfig | None


def as_product_rules(rules: ProductRules) -> tuple[ProductRule, ...]:
    """Converts a config, {pattern: config} or pairs of them to a tuple of rules.

    Raises:
        ValueError: it is none of these, or empty; or a pattern is not a str or its regular
            expression cannot be compiled.
    """
    if isinstance(rules, ProductConfig):
        return (ProductRule(Rule("*", None), rules),)
    items = rules.items() if isinstance(rules, Mapping) else rules
    if isinstance(items, str) or not hasattr(items, "__iter__"):
        raise ValueError(
            "rules must be a ProductConfig, a dict of pattern to ProductConfig or None, or a "
            f"sequence of such pairs; got {rules!r}."
        )
    found = tuple(map(_as_rule, items))
    if not found:
        raise ValueError(f"rules must not be empty; got {rules!r}. Pass a ProductConfig.")
    return found


def _as_rule(item):
    is_pair = isinstance(item, tuple) and len(item) == 2
    if not is_pair or not isinstance(item[1], ProductConfig | None):
        raise ValueError(
            "Each rule must be a pair of a pattern and a ProductConfig or None, such as "
            f'("*/kernel", training.INT8_TRAINING); got {item!r}.'
        )
    return ProductRule(Rule(item[0], None), item[1])


def choose(
    rules: tuple[ProductRule, ...], paths: list[str], leaves: list[Any]
) -> list[ProductRule | None]:
    """The rule of each parameter that is a floating-point array; None leaves it alone.

    Raises:
        ValueError: a rule matches no parameter, or one with a config only others than
            floating-point arrays.
    """
    patterns = tuple(each.rule for each in rules)
    unused = unused_rules(patterns, paths, leaves)
    if unused:
        raise ValueError(
            f"Each rule must match a parameter; got {unused[0].pattern!r}, and the paths "
            f"{', '.join(paths[:12]) or 'none'}."
        )
    by_pattern = {id(each.rule): each for each in rules}
    matched = match_rules(patterns, paths, leaves)
    pairs = list(zip(matched, leaves, strict=True))
    for each in rules:
        _check_floating(each, [leaf for rule, leaf in pairs if rule is each.rule])
    return [
        None if rule is None or not _is_floating(leaf) else by_pattern[id(rule)]
        for rule, leaf in pairs
    ]


def _check_floating(each, selected):
    if each.config is None or not selected or any(map(_is_floating, selected)):
        return
    found = getattr(selected[0], "dtype", type(selected[0]).__name__)
    raise ValueError(
        f"Each rule must match a floating-point parameter; got {each.rule.pattern!r}, which "
        f"matches {found}. Use None as its config, or drop it."
    )


def _is_floating(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
