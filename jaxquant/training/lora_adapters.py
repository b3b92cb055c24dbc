"""The rank, the base and the first adapters of each selected leaf."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..core import QTensor, low_rank_shapes, shared_axes
from ..tree import Rule
from ..tree.internal import Plan, match_rules, quantize_leaf, unused_rules
from .lora_starts import Adapted, Start

Plans = Sequence[Plan | None]


def check_options(
    rank: int | Mapping[str, int],
    alpha: float | None,
    dtype: jax.typing.DTypeLike,
    use_rslora: bool,
    start: Start | None,
) -> None:
    """Checks the options of `lora_init`.

    Raises:
        ValueError: one of them is invalid.
    """
    for r in rank.values() if isinstance(rank, Mapping) else (rank,):
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise ValueError(f"rank must be a positive int; got {r!r}. 8 to 64 are usual.")
    if use_rslora and alpha is None:
        raise ValueError(
            f"use_rslora scales adapters by alpha / sqrt(rank), and needs alpha; got {alpha}. "
            "Pass 16, say."
        )
    if start is not None and (isinstance(start, type) or not callable(start)):
        raise ValueError(
            f"start must be PiSSA(), LoftQ() or None; got {start!r}. Write start=PiSSA()."
        )
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if alpha is not None and not (is_number and 0 < alpha < math.inf):
        raise ValueError(f"alpha must be a positive number, or None for the rank; got {alpha!r}.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be floating; got {dtype!r}. Use float32 or bfloat16.")


def ranks_of(
    rank: int | Mapping[str, int], paths: Sequence[str], chosen: Plans
) -> list[int | None]:
    """The rank of each selected leaf; None for others."""
    selected = [path for path, plan in zip(paths, chosen, strict=True) if plan is not None]
    if not isinstance(rank, Mapping):
        return [None if plan is None else rank for plan in chosen]
    patterns, values = tuple(Rule(pattern, None) for pattern in rank), list(rank.values())
    unused = unused_rules(patterns, selected, selected)
    if unused:
        raise ValueError(
            f"Each pattern of rank must match a selected leaf; got {unused[0].pattern!r}, and the "
            f"selected leaves {', '.join(selected[:12])}."
        )
    rules = match_rules(patterns, selected, selected)
    without = [path for path, rule in zip(selected, rules, strict=True) if rule is None]
    if without:
        raise ValueError(
            f"rank must have a pattern for each selected leaf; got {dict(rank)}, which has none "
            f"for {without[0]}. Add a last pattern '*'."
        )
    found = iter(rule for rule in rules if rule is not None)
    return [None if plan is None else values[patterns.index(next(found))] for plan in chosen]


def check_dora(use_dora: bool, paths: Sequence[str], chosen: Plans) -> None:
    """Checks that no rule quantizes activations: they are multiplied by a dequantized weight."""
    for path, plan in zip(paths, chosen, strict=True):
        if use_dora and plan is not None and plan.scheme.inputs is not None:
            raise ValueError(
                f"use_dora multiplies activations by a dequantized weight; got {plan.scheme} for "
                f"{path}, which quantizes them. Use a scheme without inputs, such as jq.W4A16."
            )


def check_start(
    start: Start | None,
    paths: Sequence[str],
    leaves: Sequence[Any],
    chosen: Plans,
    ranks: Sequence[int | None],
) -> None:
    """Checks that each selected leaf can be decomposed."""
    if start is None:
        return
    for path, leaf, plan, rank in zip(paths, leaves, chosen, ranks, strict=True):
        if plan is None or rank is None:
            continue
        if isinstance(leaf, QTensor):
            raise ValueError(
                f"start={start} needs the float weight of {path}; got {leaf!r}. Pass the tree "
                "before it was quantized, or start=None."
            )
        stack, split = _split(axes_of(plan, leaf.ndim), leaf.ndim)
        most = min(math.prod(leaf.shape[stack:split]), math.prod(leaf.shape[split:]))
        if rank > most:
            raise ValueError(
                f"rank must be at most {most} for {path} of shape {leaf.shape}, with "
                f"start={start}; got {rank}. Lower it, or give it a rule with None."
            )


def begin_at_zero(
    leaf: Any, plan: Plan, rank: int, key: jax.Array, platform: str | None
) -> Adapted:
    """The base that the rules give, and adapters whose product is zero."""
    base = leaf if isinstance(leaf, QTensor) else quantize_leaf(leaf, plan, platform)
    a, b = _adapters(base.shape, axes_of(plan, base.ndim), rank, key)
    return base, a, b


def begin_at(
    start: Start,
    factor: float,
    leaf: Any,
    plan: Plan,
    rank: int,
    key: jax.Array,
    platform: str | None,
) -> Adapted:
    """Base and adapters of a start, whose product is multiplied by a factor."""
    stack, split = _split(axes_of(plan, leaf.ndim), leaf.ndim)
    compute = jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32
    rows, columns = math.prod(leaf.shape[stack:split]), math.prod(leaf.shape[split:])
    matrices = (*leaf.shape[:stack], rows, columns)

    def quantize_matrices(x):
        base = quantize_leaf(x.reshape(leaf.shape), plan, platform)
        return base.astype(leaf.dtype), base.dequantize().reshape(matrices)

    weight = jnp.asarray(leaf).astype(compute).reshape(matrices)
    base, a, b = start(weight, quantize_matrices, rank, key)
    a_shape, b_shape = low_rank_shapes(leaf.shape, rank, stack, split)
    root = math.sqrt(factor)
    return base, a.reshape(a_shape) / root, b.reshape(b_shape) / root


def _adapters(shape, axes, rank, key):
    """Initial a and b: one normal, the other zeros."""
    stack, split = _split(axes, len(shape))
    a_shape, b_shape = low_rank_shapes(shape, rank, stack, split)
    meets_b = axes == (len(shape) - 1,)
    inputs = math.prod(shape[split:] if meets_b else shape[stack:split])
    drawn, zeros = (b_shape, a_shape) if meets_b else (a_shape, b_shape)
    start = jax.random.normal(key, drawn, jnp.float32) / math.sqrt(max(inputs, 1))
    factors = start, jnp.zeros(zeros)
    return factors[::-1] if meets_b else factors


def axes_of(plan: Plan, ndim: int) -> tuple[int, ...]:
    """The axes along which a leaf shares scales, in ascending order."""
    return tuple(sorted(shared_axes(plan.axis, ndim, plan.scheme.weights)))


def _split(axes: tuple[int, ...], ndim: int) -> tuple[int, int]:
    """The first axis of `a`, and the first axis of `b`."""
    end = axes[-1] + 1
    return (ndim - 2, ndim - 1) if end == ndim else (axes[0], end)


def input_axes(plan: Plan, ndim: int) -> tuple[int, ...]:
    """The axes of a leaf that the product with activations sums over."""
    axes = axes_of(plan, ndim)
    stack, split = _split(axes, ndim)
    return axes if axes == (ndim - 1,) else tuple(range(stack, split))
