"""Operations that rearrange an array with adapters: its base, and each of them."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from ..core import LowRank
from ..jaxprs import Params
from . import carriers
from .parameter import Unsupported
from .reshaped import paired_axes

Rule = Callable[[LowRank, Params, Sequence[int]], LowRank]


def _transpose(x: LowRank, params: Params, shape: Sequence[int]) -> LowRank:
    """Swaps the axes of `a` with those of `b`, or moves axes within either."""
    permutation = list(params["permutation"])
    a_axes, b_axes = x.axes()
    stack = [a for a in a_axes if a in b_axes and a < x.ndim]
    first = [a for a in a_axes[:-1] if a not in stack]
    last = [a for a in b_axes if a not in stack and a < x.ndim]
    base = carriers.transpose(x.base, permutation)
    moved = permutation[: len(stack)], permutation[len(stack) :]
    if sorted(moved[0]) != stack:
        raise Unsupported("it moves the axis of stacked adapters")
    head, tail = moved[1][: len(first)], moved[1][len(first) :]
    if sorted(head) == first:
        a = x.a.transpose([*moved[0], *head, x.a.ndim - 1])
        b = _ordered(x.b, b_axes, [*moved[0], x.ndim, *tail])
        return dataclasses.replace(x, base=base, a=a, b=b)
    head, tail = moved[1][: len(last)], moved[1][len(last) :]
    if sorted(head) == last:
        a = _ordered(x.b, b_axes, [*moved[0], *head, x.ndim])
        b = _ordered(x.a, a_axes, [*moved[0], x.ndim, *tail])
        return dataclasses.replace(x, base=base, a=a, b=b)
    raise Unsupported("it mixes the axes of both adapters")


def _ordered(x, axes, wanted):
    return jnp.transpose(x, [axes.index(a) for a in wanted])


def _reshape(x: LowRank, params: Params, shape: Sequence[int]) -> LowRank:
    """Divides or joins axes within the stack, within those of `a`, or within those of `b`."""
    base = carriers.reshape(x.base, shape)
    a_axes, b_axes = x.axes()
    stack = sum(a in b_axes for a in a_axes[:-1])
    split = len(a_axes) - 1
    runs = paired_axes(x.shape, shape)
    if any(edge in run and edge != run.start for edge in (stack, split) for run, _ in runs):
        raise Unsupported("it joins axes of both adapters")
    lengths = [[], [], []]
    for run, target in runs:
        part = 0 if run.start < stack else 1 if run.start < split else 2
        lengths[part] += [shape[a] for a in target]
    stacked, first, last = lengths
    a = x.a.reshape([*stacked, *first, x.rank])
    b = x.b.reshape([*stacked, x.rank, *last])
    return dataclasses.replace(x, base=base, a=a, b=b)


def _convert(x: LowRank, params: Params, shape: Sequence[int]) -> LowRank:
    """The same adapters on a base that dequantizes to another dtype."""
    if not jnp.issubdtype(params["new_dtype"], jnp.floating):
        raise Unsupported(f"it casts to {params['new_dtype']}, which is not a floating-point dtype")
    return dataclasses.replace(x, base=x.base.astype(params["new_dtype"]))


def _without_norm(rule: Rule) -> Rule:
    """A rule for arrays whose outputs do not have trained norms."""

    def choose(x, params, shape):
        if x.magnitude is not None:
            raise Unsupported("the norms of its outputs cannot follow it")
        return rule(x, params, shape)

    return choose


RULES: dict[str, Rule] = {
    "transpose": _without_norm(_transpose),
    "reshape": _without_norm(_reshape),
    "convert": _convert,
}
