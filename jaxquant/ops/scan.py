"""Loops over stacked layers that slice codes of less than a byte as fast as other arrays.

XLA on CPU copies elements of less than a byte one at a time where it slices an array, and a loop
slices its `xs`: eight layers of 2048 x 2048 4-bit weights take 150 ms, and 2.3 ms where a native
kernel copies the bytes (`python -m benchmarks.loops` has the ratios).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from ..core import bits_of
from ..jaxprs import Copier, is_narrow, with_copied_slices
from ..kernels import native


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[Any, Any]:
    """`jax.lax.scan`, fast over stacked QTensors of less than 8 bits on CPU too.

        for i in range(length):  init, y[i] = f(init, xs[i])

    There machine code copies each slice of 2-bit and 4-bit arrays, in bytes, where XLA would copy
    elements. Everything else is `jax.lax.scan`: other platforms, exported programs and those that
    XLA divides among devices, slices that are no whole number of bytes, whatever is
    differentiated, and installs without the machine code. Results are the same, bit for bit.

    Args:
        f: from the carry and a slice to the next carry and one output.
        init: the first carry, any pytree of arrays.
        xs: pytree of arrays and QTensors, to be sliced along their first axis; `f` gets QTensors
            of one layer. None for none.
        length: number of steps; None takes it from `xs`.
        reverse: whether the last slice comes first.
        unroll: steps to unroll into one, or whether to unroll all.

    Returns:
        The last carry, and the outputs stacked.

    Raises:
        TypeError, ValueError: as `jax.lax.scan` does.
    """

    def loop(init, xs):
        return lax.scan(f, init, xs, length, reverse, unroll)

    if native.unavailable() is not None or not any(map(_is_copied, jax.tree.leaves(xs))):
        return loop(init, xs)
    return with_copied_slices(loop, _COPIER, init, xs)


def _is_copied(x):
    """Whether an array has elements of less than a byte, and slices of whole bytes."""
    if not is_narrow(x) or math.prod(x.shape) == 0:
        return False
    return math.prod(x.shape[1:]) * bits_of(x.dtype) % 8 == 0


_COPIER = Copier(_is_copied, native.take_slice)
