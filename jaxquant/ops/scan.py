"""Loops over stacked layers that do not slice codes, or slice them as fast as float32.

XLA copies the slices that a loop takes of its `xs`. On CPU it does so with sub-byte elements one at
a time, and converts whole stacks of float8, float4 and bfloat16 to wider floats before the loop.
`python -m benchmarks.loops` has the ratios.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core import bits_of
from ..jaxprs import Copier, is_narrow, is_tracer, with_copied_slices
from ..kernels import cpu
from .operands import is_quantized
from .stacks import slicing


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[Any, Any]:
    """`jax.lax.scan` that is fast on CPU, too, over stacked QTensors.

        for i in range(length):  init, y[i] = f(init, xs[i])

    Products by the native kernels for CPUs, and by those for few rows on TPU, read the weights of a
    step where they are in `xs`; XLA would copy them first. Other slices of a 2-bit or 4-bit array,
    or of floats that XLA computes in wider ones (float8, bfloat16), are copied as bytes by a native
    kernel on CPU, where XLA would copy element by element, or convert the whole stack.
    Everything else runs as `jax.lax.scan`: other platforms, exported programs, programs that XLA
    partitions, slices that do not fill whole bytes, differentiated loops, and installs without the
    native kernels. Slices are the same, bit for bit.

    Args:
        f: from the carry and a slice to the next carry and one output.
        init: the first carry, any pytree of arrays.
        xs: pytree of arrays and QTensors, sliced along their first axis; `f` gets QTensors of one
            layer. None if there is nothing to slice.
        length: number of steps; None uses the length of `xs`.
        reverse: whether to start with the last slice.
        unroll: steps to unroll into one, or whether to unroll all.

    Returns:
        The last carry, and the outputs stacked.

    Raises:
        TypeError, ValueError: as `jax.lax.scan` does.

    Example:
        >>> layers = jax.vmap(lambda w: jq.quantize(w, jq.ArrayConfig(format=jq.INT4), axis=0))(
        ...     jnp.stack([jnp.eye(4), 2 * jnp.eye(4)])
        ... )
        >>> x, _ = jq.scan(lambda x, q: (jq.matmul(x, q), None), jnp.ones((1, 4)), layers)
        >>> x
        Array([[2., 2., 2., 2.]], dtype=float32)
    """

    # Outside of `jit`, a function of another identity would be compiled in every call.
    is_traced = callable(f) and any(map(is_tracer, jax.tree.leaves(xs)))

    def loop(init: Any, xs: Any) -> Any:
        quantized = [x for x in jax.tree.leaves(xs, is_leaf=is_quantized) if is_quantized(x)]
        if not (quantized and is_traced):
            return lax.scan(f, init, xs, length, reverse, unroll)

        def body(carry: Any, slices: Any) -> tuple[Any, Any]:
            index, carry = carry
            with slicing(xs, slices, index):
                found = f(carry, slices)
            if not isinstance(found, tuple | list) or len(found) != 2:
                return found  # `lax.scan` raises an error.
            return (index + (-1 if reverse else 1), found[0]), found[1]

        last = jax.tree.leaves(quantized)[0].shape[0] - 1
        # XLA would read the index of a step out of an array.
        first = jnp.asarray(last if reverse else 0, jnp.int32)
        (_, carry), out = lax.scan(body, (first, init), xs, length, reverse, unroll)
        return carry, out

    if cpu.unavailable() is not None or not any(map(_is_copied, jax.tree.leaves(xs))):
        return loop(init, xs)
    return with_copied_slices(loop, _COPIER, init, xs)


def _is_copied(x: Any) -> bool:
    """Whether XLA on CPU is slow to slice an array, and its slices are whole bytes."""
    is_slow = is_narrow(x) or getattr(x, "dtype", None) == jnp.bfloat16
    if not is_slow or math.prod(x.shape) == 0:
        return False
    return math.prod(x.shape[1:]) * bits_of(x.dtype) % 8 == 0


_COPIER = Copier(_is_copied, cpu.take_slice)
