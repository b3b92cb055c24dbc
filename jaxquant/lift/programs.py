"""Programs inside of a program, rebuilt by the public functions that made them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core import LowRank, QTensor
from ..jaxprs import (
    closed,
    has_shardings,
    remat_options,
    scan_counts,
    scan_options,
    shard_map_options,
    while_counts,
)
from ..ops import scan
from .carriers import repeat_blocks
from .interpreter import Equation, as_array, evaluate
from .parameter import Parameter, Unsupported
from .specs import specs

Values = Sequence[Any]


def call_rule(equation: Equation, operands: Values) -> list[Any]:
    """A jitted function, or another call that runs a program once: evaluated in place."""
    params = equation.params
    if has_shardings(params):
        raise Unsupported("it is jitted with shardings of its own")
    with jax.named_scope(params.get("name", equation.eqn.primitive.name)):
        return evaluate(_program(params), operands, equation.options)


def custom_rule(equation: Equation, operands: Values) -> list[Any]:
    """A function with its own derivative, evaluated in place if nothing in it dequantizes.

    Otherwise the operands are dequantized, and the function keeps its derivative.
    """
    program, options = _program(equation.params), equation.options
    strict = dataclasses.replace(options, strict=True)
    bodies, values = _opened(operands)

    def attempt(values):
        return as_arrays(evaluate(program, bodies(values), strict), equation, "its result")

    try:
        jax.eval_shape(attempt, values)
    except ValueError as error:
        raise Unsupported(f"it has its own derivative, and inside of it: {error}") from error
    return evaluate(program, operands, options)


def _program(params):
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in params:
            return closed(params[name])
    raise Unsupported("its program is not known")


def as_arrays(values: Values, equation: Equation, what: str) -> list[Any]:
    """Values that leave a program, as arrays."""
    return [as_array(x, equation.eqn, f"{what} is an array", equation.options) for x in values]


def _opened(operands: Values):
    """A function from a pytree of values to operands of a program, and the pytree.

    Parameters are made again inside of the program, where their arrays are other ones.
    """
    paths = [x.path if isinstance(x, Parameter) else None for x in operands]
    values = [x.value if isinstance(x, Parameter) else x for x in operands]

    def bodies(values):
        pairs = zip(values, paths, strict=True)
        return [x if path is None else Parameter(x, path) for x, path in pairs]

    return bodies, values


def remat_rule(equation: Equation, operands: Values) -> list[Any]:
    """`jax.checkpoint`."""
    bodies, values = _opened(operands)
    program = _program(equation.params)

    def body(*values):
        out = evaluate(program, bodies(values), equation.options)
        return as_arrays(out, equation, "its result")

    return jax.checkpoint(body, **remat_options(equation.params))(*values)


def scan_rule(equation: Equation, operands: Values) -> list[Any]:
    """`lax.scan`: stacked parameters are sliced, others stay as they are outside of the loop."""
    params, program = equation.params, _program(equation.params)
    num_consts, num_carried = scan_counts(params)
    consts, rest = operands[:num_consts], operands[num_consts:]
    init, xs = list(rest[:num_carried]), rest[num_carried:]
    inputs = program.jaxpr.invars[num_consts:]
    passed = _passed_on(init, inputs, program.jaxpr.outvars)
    init = [
        None if i in passed else as_array(x, equation.eqn, "a loop carries it", equation.options)
        for i, x in enumerate(init)
    ]
    bodies, sliced = _opened(xs)
    sliced = [unstackable(x) for x in sliced]

    def body(carry, slices):
        carried = [passed.get(i, x) for i, x in enumerate(carry)]
        values = [*map(_reopened, consts), *map(_reopened, carried), *bodies(slices)]
        out = evaluate(program, values, equation.options)
        carry = [None if i in passed else x for i, x in enumerate(out[:num_carried])]
        outputs = as_arrays(out[num_carried:], equation, "an output of a loop")
        return as_arrays(carry, equation, "what a loop carries"), outputs

    carry, outputs = scan(body, init, sliced, **scan_options(params))
    carry = [passed.get(i, x) for i, x in enumerate(carry)]
    return [*carry, *outputs]


def _passed_on(init, inputs, outputs):
    """The Parameters among the carried values that the body returns as it got them, by place."""
    return {
        i: x for i, x in enumerate(init) if isinstance(x, Parameter) and inputs[i] is outputs[i]
    }


def _reopened(x):
    """A Parameter without the arrays that were computed from it outside of a program."""
    return Parameter(x.value, x.path) if isinstance(x, Parameter) else x


def unstackable(x: Any) -> Any:
    """What stands for an array, in a form that can be sliced along its first axis as a pytree."""
    if isinstance(x, LowRank):
        return dataclasses.replace(x, base=unstackable(x.base))
    if not isinstance(x, QTensor):
        return x
    q = x.reorder(None) if x.stored_axes([0]) != (0,) else x
    scale = unstackable(q.scale) if isinstance(q.scale, QTensor) else q.scale
    zero_point = q.zero_point
    length = q.codes.shape[0]
    scale = repeat_blocks(scale, 0, length // max(scale.shape[0], 1))
    if isinstance(scale, QTensor):
        scale = unstackable(scale)
    if zero_point is not None:
        zero_point = repeat_blocks(zero_point, 0, length // max(zero_point.shape[0], 1))
    inputs = q.inputs and _stacked_inputs(q.inputs, length)
    return dataclasses.replace(q, scale=scale, zero_point=zero_point, inputs=inputs)


def _stacked_inputs(inputs, length):
    """Calibrated values of activations with one per layer, where one was for all."""

    def repeat(value, ndim):
        if value is None or value.ndim > ndim:
            return value
        return jnp.broadcast_to(value, (length, *value.shape))

    return dataclasses.replace(
        inputs,
        scale=repeat(inputs.scale, 0),
        zero_point=repeat(inputs.zero_point, 0),
        multiplier=repeat(inputs.multiplier, 1),
    )


def while_rule(equation: Equation, operands: Values) -> list[Any]:
    """`lax.while_loop`."""
    params, options = equation.params, equation.options
    condition, body = closed(params["cond_jaxpr"]), closed(params["body_jaxpr"])
    first, second = while_counts(params)
    cond_consts, body_consts = operands[:first], operands[first : first + second]
    init = list(operands[first + second :])
    passed = _passed_on(init, body.jaxpr.invars[second:], body.jaxpr.outvars)
    init = [
        None if i in passed else as_array(x, equation.eqn, "a loop carries it", options)
        for i, x in enumerate(init)
    ]

    def opened(consts, carry):
        carried = [passed.get(i, x) for i, x in enumerate(carry)]
        return [*map(_reopened, consts), *map(_reopened, carried)]

    def goes_on(carry):
        return evaluate(condition, opened(cond_consts, carry), options)[0]

    def step(carry):
        out = evaluate(body, opened(body_consts, carry), options)
        kept = [None if i in passed else x for i, x in enumerate(out)]
        return as_arrays(kept, equation, "what a loop carries")

    carry = lax.while_loop(goes_on, step, init)
    return [passed.get(i, x) for i, x in enumerate(carry)]


def cond_rule(equation: Equation, operands: Values) -> list[Any]:
    """`lax.cond`, `lax.switch` and `lax.platform_dependent`."""
    params, (index, *values) = equation.params, operands
    bodies, values = _opened(values)

    def branch(program):
        def run(*values):
            out = evaluate(closed(program), bodies(values), equation.options)
            return as_arrays(out, equation, "the result of a branch")

        return run

    branches = [branch(program) for program in params["branches"]]
    platforms = params.get("branches_platforms")
    if platforms is None:
        return lax.switch(index, branches, *values)
    named = {name: b for names, b in zip(platforms, branches, strict=True) for name in names or ()}
    default = next((b for names, b in zip(platforms, branches, strict=True) if not names), None)
    return lax.platform_dependent(*values, default=default, **named)


def shard_map_rule(equation: Equation, operands: Values) -> list[Any]:
    """`jax.shard_map`: codes are divided as the array is, scales where they can be."""
    params, program = equation.params, _program(equation.params)
    bodies, _ = _opened(operands)
    given = zip(operands, params["in_specs"], strict=True)
    pairs = [specs(x, spec, params["mesh"]) for x, spec in given]

    def body(*values):
        out = evaluate(program, bodies(values), equation.options)
        return as_arrays(out, equation, "its result")

    return jax.shard_map(
        body,
        in_specs=tuple(spec for _, spec in pairs),
        out_specs=list(params["out_specs"]),
        **shard_map_options(params),
    )(*(value for value, _ in pairs))
