"""`lift`: a function of arrays as a function of quantized arrays."""

import functools
from collections.abc import Callable
from typing import Any

from ..core import check_flags
from ..tree.internal import leaves_with_paths
from .interpreter import Options, as_array, evaluate
from .parameter import Parameter
from .primitives import RULES
from .trace import is_input, is_quantized, trace_function


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
            would be dequantized; or `inputs` of a parameter have a multiplier, a permutation or a
            rotation, and it is used in something other than a product.

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
    check_flags(strict=strict)
    options = Options(strict, implementation, RULES)

    @functools.wraps(fn)
    def lifted(*args, **kwargs):
        paths, leaves, treedef = leaves_with_paths((args, kwargs))
        places = [i for i, x in enumerate(leaves) if is_input(x)]
        trace = trace_function(fn, leaves, treedef, places)
        names = argument_paths(paths, [is_quantized(x) for x in leaves])
        values = [
            Parameter(leaves[i], names[i], is_whole=True) if is_quantized(leaves[i]) else leaves[i]
            for i in places
        ]
        out = evaluate(trace.program, values, options)
        return trace.result([_returned(x, options) for x in out])

    return lifted


def argument_paths(paths: list[str], is_parameter: list[bool]) -> list[str]:
    """Paths within the argument that holds the parameters, without its own place in the call.

    If several arguments hold some, paths start with the number or name of the argument.
    """
    split = [path.split("/", 2) for path in paths]
    holders = {tuple(p[:2]) for p, b in zip(split, is_parameter, strict=True) if b}
    if len(holders) > 1:
        return [path.partition("/")[2] for path in paths]
    return [p[2] if len(p) > 2 else p[1] for p in split]


def _returned(x, options):
    if isinstance(x, Parameter) and x.is_whole:
        return x.value
    return as_array(x, None, "the function returns another form of it", options)
