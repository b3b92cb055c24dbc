"""What a lifted function does with quantized operands, by the name of JAX's primitive."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core import LowRank, QTensor
from ..jaxprs import Params, broadcast_axes
from . import adapters, carriers, products, programs
from .interpreter import Equation
from .parameter import Parameter, Unsupported
from .specs import constrained, resharded

Rule = Callable[[Equation, Sequence[Any]], Sequence[Any]]


def _product(function):
    """The rule of an operation of two or more operands whose result is an array."""

    def rule(equation, operands):
        out = function(equation.params, operands, equation.options.implementation)
        return [out.astype(equation.eqn.outvars[0].aval.dtype)]

    return rule


def _carrier(function: Callable[[QTensor, Params, Equation], QTensor]) -> Rule:
    """The rule of an operation that rearranges its first operand; others are arrays of indices."""

    def rule(equation, operands):
        x, *others = operands
        if not isinstance(x, Parameter) or any(isinstance(y, Parameter) for y in others):
            raise Unsupported("a quantized array selects elements of another one")
        return [x.derive(function(x.qtensor(), equation.params, equation, *others))]

    return rule


def _with_adapters(name, rule):
    """The rule, but for arrays with adapters that of `adapters`."""

    def choose(equation, operands):
        x = operands[0]
        if not isinstance(x, Parameter) or not isinstance(x.value, LowRank):
            return rule(equation, operands)
        return [x.derive(adapters.RULES[name](x.value, equation.params, equation.shapes[0]))]

    return choose


def _transpose(q, params, equation):
    return carriers.transpose(q, params["permutation"])


def _reshape(q, params, equation):
    if params.get("dimensions") is not None:
        raise Unsupported("it permutes axes, too")
    return carriers.reshape(q, equation.shapes[0])


def _rev(q, params, equation):
    return carriers.rev(q, params["dimensions"])


def _to_shape(q, params, equation):
    return carriers.reshape(q, equation.shapes[0])


def _broadcast_in_dim(q, params, equation, *sizes):
    if sizes:
        raise Unsupported("its shape is not static")
    return carriers.broadcast_in_dim(q, params["shape"], params["broadcast_dimensions"])


def _slice(q, params, equation):
    return carriers.slice(q, params["start_indices"], params["limit_indices"], params["strides"])


def _dynamic_slice(q, params, equation, *starts):
    return carriers.dynamic_slice(q, starts[: q.ndim], params["slice_sizes"])


def _dynamic_slice_rule(equation, operands):
    """`lax.dynamic_slice`; one row of a table is a lookup, as is `jnp.take` of a scalar index."""
    (x,) = _carrier(_dynamic_slice)(equation, operands)
    (shape,) = equation.shapes
    x.is_row = x.is_row or (
        len(shape) == 2 and 1 in shape and x.value.shape != operands[0].value.shape
    )
    return [x]


def _convert_element_type(q, params, equation):
    if not jnp.issubdtype(params["new_dtype"], jnp.floating):
        raise Unsupported(f"it casts to {params['new_dtype']}, which is not a floating-point dtype")
    return q.astype(params["new_dtype"])


def _parts(x: Parameter, axis: int, lengths: Sequence[int]) -> list[QTensor]:
    """A quantized array cut along an axis into parts of these lengths."""
    q, ends = x.qtensor(), list(itertools.accumulate(lengths))
    starts, limits = [0] * q.ndim, list(q.shape)
    out = []
    for length, end in zip(lengths, ends, strict=True):
        starts[axis], limits[axis] = end - length, end
        out.append(carriers.slice(q, starts, limits, None))
    return out


def _split_rule(equation, operands):
    """`lax.split`."""
    (x,), axis = operands, equation.params["axis"]
    parts = _parts(x, axis, [shape[axis] for shape in equation.shapes])
    return [x.derive(part) for part in parts]


def _unstack_rule(equation, operands):
    """`lax.unstack`."""
    (x,), shapes = operands, equation.shapes
    parts = _parts(x, equation.params["axis"], [1] * len(shapes))
    pairs = zip(parts, shapes, strict=True)
    return [x.derive(carriers.reshape(part, shape)) for part, shape in pairs]


def _joined(operands, axis, shape=None):
    """Quantized arrays, reshaped if there is a shape, joined along an axis."""
    if not all(isinstance(x, Parameter) for x in operands):
        raise Unsupported("it joins quantized arrays with others")
    parts = [
        x.qtensor() if shape is None else carriers.reshape(x.qtensor(), shape) for x in operands
    ]
    paths = dict.fromkeys(x.path for x in operands)
    return [Parameter(carriers.concatenate(parts, axis), " + ".join(paths))]


def _concatenate_rule(equation, operands):
    """`lax.concatenate`."""
    return _joined(operands, equation.params["dimension"])


def _stack_rule(equation, operands):
    """`lax.stack`."""
    axis = equation.params["axis"]
    shape = list(equation.shapes[0])
    shape[axis] = 1
    return _joined(operands, axis, shape)


def _scaling_rule(operation, equation, operands):
    """`lax.mul` or `lax.div` by a scalar, or by one number per block."""
    x, factor = operands
    if operation is lax.mul and not isinstance(x, Parameter):
        x, factor = factor, x
        place = 0
    else:
        place = 1
    if not isinstance(x, Parameter) or isinstance(factor, Parameter):
        raise Unsupported("it multiplies two quantized arrays, or divides by one")
    q = x.qtensor()
    if equation.shapes[0] != q.shape:
        raise Unsupported("it broadcasts the quantized array")
    if jnp.shape(factor) == q.shape:
        factor = _before_broadcast(equation, place, factor)
    return [x.derive(carriers.multiply(q, factor, operation))]


def _before_broadcast(equation, place, factor):
    """A factor with length 1 along the axes along which it was broadcast."""
    maker = equation.environment.maker(equation.eqn.invars[place])
    if maker is None or (targets := broadcast_axes(maker)) is None:
        return factor
    (small,) = equation.environment.read(maker.invars[:1])
    lengths = [1] * factor.ndim
    for a, target in enumerate(targets):
        lengths[target] = small.shape[a]
    return jnp.reshape(small, lengths)


def _negate_rule(equation, operands):
    """`lax.neg`."""
    (x,) = operands
    return [x.derive(carriers.multiply(x.qtensor(), jnp.float32(-1), lax.mul))]


def _arrays_rule(equation, operands):
    """An operation that returns its operands, on each of the arrays of a quantized one."""
    values = [products.operand(x) for x in operands]
    leaves, treedef = jax.tree.flatten(values)
    out = jax.tree.unflatten(treedef, _bind(equation, leaves))
    pairs = zip(operands, out, strict=True)
    return [x.derive(y) if isinstance(x, Parameter) else y for x, y in pairs]


def _bind(equation, leaves):
    """The primitive with other operands: one call if it takes any number of them."""
    if equation.eqn.primitive.multiple_results:
        return equation.eqn.primitive.bind(*leaves, **equation.params)
    return [equation.eqn.primitive.bind(x, **equation.params) for x in leaves]


def _identity_rule(equation, operands):
    """An operation that does not change an array."""
    return [operands[0]]


def _write_rule(equation, operands):
    """`lax.dynamic_update_slice` and `lax.scatter`, as caches are written."""
    raise Unsupported("no scheme says how to quantize the values that are written into it")


def _sharding_rule(equation, operands):
    """`lax.with_sharding_constraint`."""
    if equation.params.get("unconstrained_dims"):
        raise Unsupported("it leaves some axes unconstrained")
    return [constrained(operands[0], equation.params["sharding"])]


def _reshard_rule(equation, operands):
    """`jax.sharding.reshard`, which functions with `out_sharding` call, too."""
    return [resharded(operands[0], equation.params["dst_sharding"])]


RULES: Mapping[str, Rule] = {
    "dot_general": _product(products.dot_general_rule),
    "conv_general_dilated": _product(products.convolution_rule),
    "ragged_dot_general": _product(products.ragged_dot_rule),
    "gather": _product(products.gather_rule),
    "transpose": _with_adapters("transpose", _carrier(_transpose)),
    "reshape": _with_adapters("reshape", _carrier(_reshape)),
    "squeeze": _with_adapters("reshape", _carrier(_to_shape)),
    "expand_dims": _with_adapters("reshape", _carrier(_to_shape)),
    "broadcast_in_dim": _carrier(_broadcast_in_dim),
    "rev": _carrier(_rev),
    "slice": _carrier(_slice),
    "dynamic_slice": _dynamic_slice_rule,
    "dynamic_update_slice": _write_rule,
    "scatter": _write_rule,
    "split": _split_rule,
    "unstack": _unstack_rule,
    "concatenate": _concatenate_rule,
    "stack": _stack_rule,
    "convert_element_type": _with_adapters("convert", _carrier(_convert_element_type)),
    "mul": partial(_scaling_rule, lax.mul),
    "div": partial(_scaling_rule, lax.div),
    "neg": _negate_rule,
    "copy": _identity_rule,
    "copy_p": _identity_rule,
    "stop_gradient": _arrays_rule,
    "name": _arrays_rule,
    "optimization_barrier": _arrays_rule,
    # Of an array that all devices have, in shard_map.
    "pvary": _arrays_rule,
    "sharding_constraint": _sharding_rule,
    "reshard": _reshard_rule,
    "jit": programs.call_rule,
    "pjit": programs.call_rule,
    "closed_call": programs.call_rule,
    "core_call": programs.call_rule,
    "custom_jvp_call": programs.custom_rule,
    "custom_vjp_call": programs.custom_rule,
    "call_hi_primitive": programs.hijax_rule,
    "remat2": programs.remat_rule,
    "checkpoint": programs.remat_rule,
    "scan": programs.scan_rule,
    "while": programs.while_rule,
    "cond": programs.cond_rule,
    "shard_map": programs.shard_map_rule,
}
