"""Where the slices that a loop takes come from, so that kernels can read them in the stack.

A kernel gets whole arrays: XLA would copy the slice of each step for it.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..core import QTensor

# By the id of a slice: the slice, the stack and the index of the step.
_Slices = dict[int, tuple[jax.Array, jax.Array, jax.Array]]
_KNOWN: contextvars.ContextVar[_Slices | None] = contextvars.ContextVar("_KNOWN", default=None)


@contextlib.contextmanager
def slicing(stacks: Any, slices: Any, index: jax.Array) -> Iterator[None]:
    """Within this context, `stack_of` knows of these slices.

    Args:
        stacks: pytree of arrays.
        slices: the same of what a step of a loop gets.
        index: of the slices in the stacks.
    """
    pairs = zip(jax.tree.leaves(slices), jax.tree.leaves(stacks), strict=True)
    found = {id(own): (own, stack, index) for own, stack in pairs}
    token = _KNOWN.set({**(_KNOWN.get() or {}), **found})
    try:
        yield
    finally:
        _KNOWN.reset(token)


def stack_of(x: Any) -> tuple[QTensor, jax.Array] | None:
    """The stack of which a quantized array is a slice, and its index; None if it is not known.

    Functions that are compiled apart, with the slice as an argument, do not know.
    """
    known = _KNOWN.get()
    if known is None or not isinstance(x, QTensor):
        return None
    bare = dataclasses.replace(x, inputs=None, values=None)
    leaves, treedef = jax.tree.flatten(bare)
    entries = [known.get(id(leaf)) for leaf in leaves]
    found = [e for e in entries if e is not None]
    if len(found) < len(leaves) or any(e[2] is not found[0][2] for e in found):
        return None
    return jax.tree.unflatten(treedef, [stack for _, stack, _ in found]), found[0][2]


def has_plain_scales(stack: QTensor, axes: Sequence[int]) -> bool:
    """Whether scales are float32, with one for each element along these stored axes.

    Kernels read them in the stack. Others must be repeated or converted, for which a step of a loop
    takes those of its slice alone.
    """
    scale = stack.scale
    if isinstance(scale, QTensor) or scale.dtype != jnp.float32:
        return False
    return all(scale.shape[a] == stack.codes.shape[a] for a in axes)
