"""The program of a function, whatever its arguments and results are."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ..core import LowRank, QTensor, TrainedArray
from ..jaxprs import is_tracer


class Trace(NamedTuple):
    """A function's program, and the structure of what the function returns.

    Attributes:
        program: from the arguments that are arrays to the results that are.
        result: from the program's results to what the function returns.
    """

    program: Any
    result: Callable[[list[Any]], Any]


def trace_function(
    fn: Callable[..., Any], leaves: list[Any], treedef: Any, places: list[int]
) -> Trace:
    """Traces fn(*args, **kwargs) with float arrays in place of quantized leaves.

    Args:
        fn: the function.
        leaves, treedef: of (args, kwargs).
        places: which leaves are arrays, or stand for some.
    """
    returned = []

    def flat(*arrays):
        filled = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            filled[i] = x
        args, kwargs = jax.tree.unflatten(treedef, filled)
        out, structure = jax.tree.flatten(fn(*args, **kwargs), is_leaf=is_quantized)
        is_array = [_is_output(x) for x in out]
        others = [None if b else x for x, b in zip(out, is_array, strict=True)]
        returned[:] = [structure, is_array, others]
        return [x for x, b in zip(out, is_array, strict=True) if b]

    program = jax.make_jaxpr(flat)(*plain_arrays([leaves[i] for i in places]))
    structure, is_array, others = returned

    def result(values):
        arrays = iter(values)
        pairs = zip(others, is_array, strict=True)
        return jax.tree.unflatten(structure, [next(arrays) if b else x for x, b in pairs])

    return Trace(program, result)


def is_quantized(x: Any) -> bool:
    """Whether a leaf stands for an array."""
    return isinstance(x, QTensor | LowRank | TrainedArray)


def is_input(x: Any) -> bool:
    """Whether a leaf is an array or stands for one; others are passed on as they are."""
    is_numeric = isinstance(x, np.ndarray | np.generic) and x.dtype.kind not in "OSU"
    return is_quantized(x) or isinstance(x, jax.Array) or is_numeric or is_tracer(x)


def _is_output(x):
    return is_input(x) or isinstance(x, bool | int | float | complex)


def plain_arrays(values: Sequence[Any]) -> list[Any]:
    """Arrays, and for quantized ones the abstract float arrays that they stand for."""
    known = {}

    def plain(x):
        if not is_quantized(x):
            return x
        arrays, structure = jax.tree.flatten(x)
        key = structure, tuple(map(jax.typeof, arrays))
        if key not in known:
            known[key] = jax.eval_shape(_dequantize, x)
        return known[key]

    # Equations are evaluated in the context in which they were traced, which names the mesh even
    # if there is none. JAX traces functions once per context; here it is that one.
    with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh()):
        return [plain(x) for x in values]


def _dequantize(x):
    return (x.quantize() if isinstance(x, TrainedArray) else x).dequantize()
