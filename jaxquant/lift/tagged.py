"""What a function does with tagged float arrays: rules that keep the tag while it can be.

A tagged array stays one through operations that rearrange or scale it, and is recognized by the
rules of products, which a caller adds. Other operations get the float array.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from ..jaxprs import broadcast_axes, checkpoint_name_of, remat_options
from . import programs
from .interpreter import Equation, as_array
from .parameter import Parameter, Tagged, Unsupported
from .primitives import RULES, Rule


def is_tagged(x: Any) -> bool:
    """Whether a value is a Parameter that is tagged."""
    return isinstance(x, Parameter) and isinstance(x.value, Tagged)


def tagged_rules(products: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rules of `lift`, with other ones for equations with a tagged operand.

    Args:
        products: rules of operations that use the tag, by the name of the primitive.
    """
    own = {**_RULES, **products}
    return {name: _choose(own.get(name), RULES.get(name)) for name in {*own, *RULES}}


def _choose(of_tagged: Rule | None, of_others: Rule | None) -> Rule:
    def rule(equation, operands):
        found = of_tagged if any(map(is_tagged, operands)) else of_others
        if found is None:
            raise Unsupported("it has no form for such arrays")
        return found(equation, operands)

    return rule


def _arrays(equation, operands):
    """The operands as arrays; those that are quantized cannot stay so."""
    if any(isinstance(x, Parameter) and not is_tagged(x) for x in operands):
        raise Unsupported("it combines a quantized array with one that is trained")
    return [as_array(x, equation.eqn, "", equation.options) for x in operands]


def _rearranged(equation: Equation, operands: Sequence[Any]) -> list[Any]:
    """An operation whose results have elements of its first operand; others are indices."""
    x, *others = operands
    if not is_tagged(x) or any(isinstance(y, Parameter) for y in others):
        raise Unsupported("an array selects elements of another one")
    out = equation.environment.evaluate(equation.eqn, _arrays(equation, operands))
    if not jnp.issubdtype(out[0].dtype, jnp.floating):
        raise Unsupported(f"it casts to {out[0].dtype}, which is not a floating-point dtype")
    return [x.derive(x.value.with_array(y)) for y in out]


def _dynamic_slice(equation, operands):
    """One row of a table is a lookup, as is `jnp.take` of a scalar index."""
    (shape,) = equation.shapes
    if len(shape) == 2 and 1 in shape and shape != operands[0].value.array.shape:
        raise Unsupported("it looks up a row")
    return _rearranged(equation, operands)


def _each(equation: Equation, operands: Sequence[Any]) -> list[Any]:
    """An operation that returns its operands."""
    out = equation.environment.evaluate(equation.eqn, _arrays(equation, operands))
    pairs = zip(operands, out, strict=True)
    return [x.derive(x.value.with_array(y)) if is_tagged(x) else y for x, y in pairs]


def _joined(equation: Equation, operands: Sequence[Any]) -> list[Any]:
    """`lax.concatenate` and `lax.stack` of arrays with the same tag."""
    values = [x.value if is_tagged(x) else None for x in operands]
    if None in values or len({v.tag for v in values if v is not None}) > 1:
        raise Unsupported("it joins arrays with different tags")
    if any(v.extra is not None for v in values if v is not None):
        raise Unsupported("each of the arrays that it joins has its own state")
    (out,) = equation.environment.evaluate(equation.eqn, _arrays(equation, operands))
    path = " + ".join(dict.fromkeys(x.path for x in operands))
    return [Parameter(operands[0].value.with_array(out), path)]


def _scaled(equation: Equation, operands: Sequence[Any]) -> list[Any]:
    """An elementwise operation of an array with a smaller one: a matrix and a scale, say."""
    (out,) = equation.environment.evaluate(equation.eqn, _arrays(equation, operands))
    small = [_is_smaller(equation, place, out.size) for place in range(2)]
    for x, is_small, is_other_small in zip(operands, small, reversed(small), strict=True):
        if is_tagged(x) and is_other_small and not is_small:
            return [x.derive(x.value.with_array(out))]
    raise Unsupported("it combines two arrays of one size")


def _is_smaller(equation, place, size):
    """Whether an operand has fewer elements than the result, or was broadcast from fewer."""
    atom = equation.eqn.invars[place]
    maker = equation.environment.maker(atom)
    if maker is not None and broadcast_axes(maker) is not None:
        atom = maker.invars[0]
    return atom.aval.size < max(size, 2)


def _custom(equation, operands):
    """A function with its own derivative keeps it: it gets arrays."""
    raise Unsupported("it has its own derivative")


def _hijax(equation, operands):
    """A primitive of `jax.experimental.hijax`."""
    params = equation.params
    if checkpoint_name_of(params) is None and remat_options(params) is None:
        raise Unsupported("it has its own derivative")
    return programs.hijax_rule(equation, operands)


_REARRANGING = ("transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "slice")
_REARRANGING += ("split", "unstack", "rev", "convert_element_type", "neg")
_RETURNING = ("copy", "copy_p", "stop_gradient", "name", "optimization_barrier", "pvary")
_RETURNING += ("sharding_constraint", "reshard", "reduce_precision")
_PROGRAMS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "scan", "while")
_PROGRAMS += ("cond", "shard_map")
_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_REARRANGING, _rearranged),
    **dict.fromkeys(_RETURNING, _each),
    **{name: RULES[name] for name in _PROGRAMS},
    **dict.fromkeys(("mul", "div", "add", "sub"), _scaled),
    **dict.fromkeys(("concatenate", "stack"), _joined),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _custom),
    "dynamic_slice": _dynamic_slice,
    "call_hi_primitive": _hijax,
}
