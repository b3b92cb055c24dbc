"""The native kernel that runs elementwise steps over arrays, some of them in blocks of codes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...core import Format, QTensor
from ...jaxprs import Step
from .library import call_kernel

# Update::Step::Operation of common.h, in its order.
OPERATIONS = (
    *("copy", "negate", "magnitude", "root", "sign", "round_to_bfloat16"),
    *("add", "subtract", "multiply", "divide", "maximum", "minimum"),
    *("equal", "less", "less_or_equal", "select", "combine"),
)
_OPERANDS = 4
_NO_BOOK = (0, 0, 0)


def update_blocks(
    steps: Sequence[Step],
    inputs: Sequence[jax.Array | QTensor],
    scalars: Sequence[jax.Array],
    outputs: Sequence[jax.typing.DTypeLike | int],
    words: Sequence[jax.Array] | None = None,
    after: jax.Array | None = None,
    instructions: str | None = None,
) -> list[jax.Array | QTensor]:
    """Runs steps on each element of some arrays, which are decoded before and encoded after.

    Args:
        steps: in order, of OPERATIONS. Slots are those of inputs, then of outputs, then others.
        inputs: arrays of one shape, at least one of them quantized: float32, bfloat16, or codes of
            formats that `why_unsupported_blocks` accepts, with one float32 scale per block, in
            blocks of the same shape.
        scalars: float32 ().
        outputs: for each, float32 or bfloat16, or the place of the input that it replaces: it gets
            the format and blocks, and the memory where XLA can overwrite it.
        words: uint32 (2,) for each output, random words for stochastic rounding; None rounds to
            nearest.
        after: array that XLA must have computed before; None for none.
        instructions: as for `quantize_rows`.

    Returns:
        The outputs.

    Error: steps are those of IEEE 754 in float32, products and sums fused or not. Decoding: 6e-7 of
        the value. Codes and scales are those of `quantize` under `jax.jit`, but where a value lies
        within 4e-4 of a step of the border between two codes, it may get the other one.
    """
    stored = [x for x in inputs if isinstance(x, QTensor)]
    shape, counts = stored[0].codes.shape, jnp.shape(stored[0].scale)
    blocks = [n // count for n, count in zip(shape, counts, strict=True)]
    arguments, places = [], []
    for x in inputs:
        places.append(len(arguments))
        arguments += [x.codes, x.scale] if isinstance(x, QTensor) else [x]
    # The inputs are after three other arguments.
    results, aliases, replaced = [], {}, []
    for out in outputs:
        if not isinstance(out, int):
            results.append(jax.ShapeDtypeStruct(shape, out))
            replaced.append(None)
            continue
        q: Any = inputs[out]
        aliases |= {3 + places[out] + i: len(results) + i for i in range(2)}
        results += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q.codes, q.scale)]
        replaced.append(q)
    found = call_kernel(
        "update_blocks",
        results,
        instructions,
        jnp.stack(list(scalars) or [jnp.float32(0)]),
        jnp.zeros(0, jnp.uint32) if words is None else jnp.stack(list(words)),
        jnp.zeros(0) if after is None else after,
        *arguments,
        aliases=aliases,
        inputs=np.int64(len(inputs)),
        slots=np.int64(max([len(inputs) + len(outputs) - 1, *(step.out for step in steps)]) + 1),
        steps=np.asarray([n for step in steps for n in _numbers(step)], np.int64),
        books=np.asarray([_book(x) for x in (*inputs, *replaced)], np.int64).reshape(-1),
        blocks=np.asarray(blocks, np.int64),
    )
    taken = iter(found)
    return [
        next(taken) if q is None else dataclasses.replace(q, codes=next(taken), scale=next(taken))
        for q in replaced
    ]


def why_unsupported_blocks(shape: tuple[int, ...], format: Format) -> str | None:
    """Why the kernel does not have arrays of this shape in a format, or None."""
    if format.codebook is None or format.power is None:
        return f"{format} has no codebook of powers"
    if (format.qmin, format.qmax) != (format.codebook[0], format.codebook[-1]):
        return f"{format} does not use all of its codebook"
    if format.bits not in (4, 8):
        return f"{format} has codes of {format.bits} bits"
    if math.prod(shape or (0,)) == 0:
        return f"the array is empty or a scalar: {shape}"
    if format.bits == 4 and shape[-1] % 2:
        return f"rows of {shape[-1]} 4-bit codes do not begin with a byte"
    return None


def _numbers(step: Step) -> list[int]:
    """A step as the kernel reads it."""
    unused = [-1] * (_OPERANDS - len(step.operands))
    return [OPERATIONS.index(step.operation), step.out, *step.operands, *unused]


def _book(x: Any) -> tuple[int, ...]:
    """Power of a codebook, entries beside zero, and whether these are on both sides; or zeros."""
    if not isinstance(x, QTensor):
        return _NO_BOOK
    book, power = x.format.codebook, x.format.power
    assert book is not None, f"{x.format} does not have a codebook"
    assert power is not None, f"{x.format} is not of powers"
    count = len(book) // 2 if x.format.has_negative else len(book) - 1
    return power, count, x.format.has_negative
