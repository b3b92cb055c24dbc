"""Markers: records that operations leave in a program while it is traced within `marking`.

A record is a parameter of a primitive that returns its first operand and lowers to nothing, so
every transformation of the program transforms it as well.
"""

import contextlib
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Stored = jax.Array | np.ndarray

# Part of the key of JAX's caches: a function that was traced before is traced again within the
# context, and its trace with markers is used nowhere else. The value is that of the thread: None
# where nothing is marked, else the path of the parameter that an operation is about, or "".
_marking = jax.make_user_context(default_value=None)


def marking() -> contextlib.AbstractContextManager[None]:
    """A context in which operations add markers to the programs that this thread traces."""
    return _marking("")


def is_marking() -> bool:
    """Whether operations leave markers now."""
    return _marking.value is not None


def naming(parameter: str) -> contextlib.AbstractContextManager[None]:
    """A context in which markers, if there are any, say which parameter they are about."""
    return contextlib.nullcontext() if _marking.value is None else _marking(parameter)


def mark(
    out: jax.Array, lhs: Stored, rhs: Stored, make_record: Callable[[], Hashable]
) -> jax.Array:
    """`out`; within `marking`, with a record of the operation that computed it.

    Args:
        out: the result of the operation.
        lhs, rhs: arrays of its two operands. Where `vmap` adds an axis to `out`, `lhs` or `rhs`,
            the copies of each are counted.
        make_record: returns the record; only called within `marking`.
    """
    parameter = _marking.value
    if parameter is None:
        return out
    return marker_p.bind(out, lhs, rhs, record=make_record(), parameter=parameter, copies=(1, 1, 1))


# Parameters: the record, the parameter that it is about, and the copies of the result, of lhs and
# of rhs that `vmap` made.
marker_p: Primitive = Primitive("quantized_product")


@marker_p.def_abstract_eval
def _(out: Any, lhs: Any, rhs: Any, **parameters: Any) -> Any:
    return out


@marker_p.def_impl
def _(out: Any, lhs: Any, rhs: Any, **parameters: Any) -> Any:
    return out


def _batch(args, axes, copies, **parameters):
    is_batched = [axis is not None for axis in axes]
    length = args[0].shape[axes[0]]
    copies = tuple(n * length if b else n for n, b in zip(copies, is_batched, strict=True))
    return marker_p.bind(*args, copies=copies, **parameters), axes[0]


batching.primitive_batchers[marker_p] = _batch
# Linear in the result, and constant in the operands.
ad.primitive_transposes[marker_p] = lambda ct, *operands, **parameters: [ct, None, None]
mlir.register_lowering(marker_p, lambda ctx, out, lhs, rhs, **parameters: [out])
