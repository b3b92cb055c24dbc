"""`lift`: a function of arrays as a function of quantized arrays."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ..core import LowRank, QTensor, TrainedArray
from ..jaxprs import is_tracer
from ..tree.internal import leaves_with_paths
from .interpreter import Options, as_array, evaluate
from .parameter import Parameter
from .primitives import RULES


def lift(
    fn: Callable[..., Any], *, strict: bool = False, implementation: str | None = None
) -> Callable[..., Any]:
    """Transforms a function of arrays into one that accepts quantized arrays in their place.

        lift(fn)(q, x) ~ fn(dequantize(q), x), without dequantizing

    `fn` is traced as if each quantized argument was a float array, and the trace is evaluated:
    matrix multiplications, convolutions and lookups run as `jaxquant.dot_general`,
    `conv_general_dilated`, `ragged_dot` and `take`, whatever library they come from. Operations
    that only rearrange a parameter, or scale it, are applied to its codes and scales. Anything else
    dequantizes the parameter where it is used; `explain` lists each such place, with the reason.

    Use it as `jax.jit(jq.lift(fn))`: like `jax.grad`, it traces `fn` each time it is called.
    Differentiate, vectorize and jit the lifted function, not the other way round. `fn` may use
    jit, scan, while_loop, cond, checkpoint, shard_map, vmap and grad as always.

    Args:
        fn: any function that JAX can trace, such as `model.apply`. Quantized arrays that it closes
            over, instead of getting them as arguments, cannot be found.
        strict: whether it is an error if a parameter would be dequantized.
        implementation: that of each product, as for `dot_general`; None selects it.

    Returns:
        Function with the signature of fn. Any argument may be, or contain, QTensors, and leaves of
        `training.prepare` and `training.lora_init`. Arguments that are not arrays are passed to fn
        as they are. A quantized argument that fn returns is returned as it is.

    Raises:
        ValueError: fn is not a function; or, from the lifted function: strict, and a parameter
            would be dequantized; or the activations of a parameter have a multiplier, and it is
            used in something other than a product.

    Gradients: those of the operations of jaxquant; adapters and prepared parameters are trained.
    Error: that of `dot_general`. A parameter that is cast to a wider dtype is not rounded to the
        narrower one before.

    Example:
        >>> def apply(params, x):
        ...     return jax.nn.relu(x @ params["kernel"]) + params["bias"]
        >>> params = {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}
        >>> quantized = jq.tree.quantize(params, jq.W8A8)
        >>> jax.jit(jq.lift(apply))(quantized, jnp.ones((1, 8))).round(2).tolist()
        [[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    """
    if not callable(fn):
        raise ValueError(
            "lift expects a function, as in jax.jit(jq.lift(model.apply)); got "
            f"{type(fn).__name__}."
        )
    options = Options(strict, implementation, RULES)

    @functools.wraps(fn)
    def lifted(*args, **kwargs):
        paths, leaves, treedef = leaves_with_paths((args, kwargs))
        places = [i for i, x in enumerate(leaves) if _is_input(x)]
        trace = trace_function(fn, leaves, treedef, places)
        names = argument_paths(paths, [_is_quantized(x) for x in leaves])
        values = [
            Parameter(leaves[i], names[i], is_whole=True) if _is_quantized(leaves[i]) else leaves[i]
            for i in places
        ]
        out = evaluate(trace.program, values, options)
        return trace.result([_returned(x, options) for x in out])

    return lifted


class Trace:
    """A function's program, and the structure of what the function returns.

    Attributes:
        program: from the arguments that are arrays to the results that are.
        result: from the program's results to what the function returns.
    """

    def __init__(self, program: Any, result: Callable[[list[Any]], Any]):
        self.program = program
        self.result = result


def trace_function(fn: Callable[..., Any], leaves: list[Any], treedef: Any, places: list[int]):
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
        out, structure = jax.tree.flatten(fn(*args, **kwargs), is_leaf=_is_quantized)
        is_array = [_is_output(x) for x in out]
        others = [None if b else x for x, b in zip(out, is_array, strict=True)]
        returned[:] = [structure, is_array, others]
        return [x for x, b in zip(out, is_array, strict=True) if b]

    program = jax.make_jaxpr(flat)(*(_plain(leaves[i]) for i in places))
    structure, is_array, others = returned

    def result(values):
        arrays = iter(values)
        pairs = zip(others, is_array, strict=True)
        return jax.tree.unflatten(structure, [next(arrays) if b else x for x, b in pairs])

    return Trace(program, result)


def argument_paths(paths: list[str], is_parameter: list[bool]) -> list[str]:
    """Paths within the argument that holds the parameters, without its own place in the call.

    If several arguments hold some, paths start with the number or name of the argument.
    """
    split = [path.split("/", 2) for path in paths]
    holders = {tuple(p[:2]) for p, b in zip(split, is_parameter, strict=True) if b}
    if len(holders) > 1:
        return [path.partition("/")[2] for path in paths]
    return [p[2] if len(p) > 2 else p[1] for p in split]


def _is_quantized(x):
    return isinstance(x, QTensor | LowRank | TrainedArray)


def _is_input(x):
    """Whether a leaf is an array or stands for one; others are passed on as they are."""
    is_numeric = isinstance(x, np.ndarray | np.generic) and x.dtype.kind not in "OSU"
    return _is_quantized(x) or isinstance(x, jax.Array) or is_numeric or is_tracer(x)


def _is_output(x):
    return _is_input(x) or isinstance(x, bool | int | float | complex)


def _plain(x):
    """An array, or the abstract float array that a quantized one stands for."""
    if not _is_quantized(x):
        return x
    return jax.eval_shape(_dequantize, x)


def _dequantize(x):
    return (x.quantize() if isinstance(x, TrainedArray) else x).dequantize()


def _returned(x, options):
    if isinstance(x, Parameter) and x.is_whole:
        return x.value
    return as_array(x, None, "the function returns another form of it", options)
