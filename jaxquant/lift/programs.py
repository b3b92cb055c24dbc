"""Programs inside of a program, rebuilt by the public functions that made them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ..core import LowRank, QTensor, repeat_blocks
from ..jaxprs import (
    call_shardings,
    called_program,
    checkpoint_name_of,
    closed,
    passed_operands,
    remat_options,
    scan_counts,
    scan_options,
    shard_map_options,
    while_counts,
)
from ..ops import scan
from .interpreter import Equation, WouldDequantizeError, as_array, evaluate
from .parameter import Parameter, Unsupported
from .specs import constrained, specs

Values = Sequence[Any]


def call_rule(equation: Equation, operands: Values) -> list[Any]:
    """A jitted function, or another call that runs a program once: evaluated in place.

    The shardings of a jitted function become constraints.
    """
    params, (before, after) = equation.params, call_shardings(equation.eqn)
    with jax.named_scope(params.get("name", equation.eqn.primitive.name)):
        operands = [constrained(x, s) for x, s in zip(operands, before, strict=True)]
        out = evaluate(called_program(params), operands, equation.options)
        return [constrained(x, s) for x, s in zip(out, after, strict=True)]


def custom_rule(equation: Equation, operands: Values) -> list[Any]:
    """A function with its own derivative, evaluated in place if nothing in it dequantizes.

    Otherwise the operands are dequantized, and the function keeps its derivative.
    """
    program, options = called_program(equation.params), equation.options
    strict = dataclasses.replace(options, strict=True)
    bodies, values = _opened(operands)

    def attempt(values):
        return as_arrays(
            evaluate(program, bodies(values), strict), equation, "its result is an array"
        )

    try:
        jax.eval_shape(attempt, values)
    except WouldDequantizeError as error:
        raise Unsupported(f"it has its own derivative, and dequantizes {error.place}") from error
    return evaluate(program, operands, options)


def hijax_rule(equation: Equation, operands: Values) -> list[Any]:
    """A primitive of `jax.experimental.hijax`, which JAX uses with `jax_remat3` and others."""
    params = equation.params
    name = checkpoint_name_of(params)
    if name is not None:
        value = jax.tree.map(lambda x: checkpoint_name(x, name), operands[0].value)
        return [operands[0].derive(value)]
    if called_program(params) is None:
        raise Unsupported("it has no form for quantized arrays")
    rule = custom_rule if remat_options(params) is None else remat_rule
    return rule(equation, operands)


def as_arrays(values: Values, equation: Equation, why: str) -> list[Any]:
    """Values that leave a program, as arrays; `why` says for what reason they have to be."""
    return [as_array(x, equation.eqn, why, equation.options) for x in values]


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
    program, passed = called_program(equation.params), _passed(equation, operands)

    def body(*values):
        out = evaluate(program, bodies(values), equation.options)
        return as_arrays(_without(passed, out), equation, "its result is an array")

    return _with(passed, jax.checkpoint(body, **remat_options(equation.params) or {})(*values))


def _passed(equation: Equation, operands: Values) -> dict[int, Parameter]:
    """The results of an equation that are its operands and quantized, by place."""
    places = passed_operands(equation.eqn)
    sources = {i: operands[p] for i, p in enumerate(places) if p is not None}
    return {i: x for i, x in sources.items() if isinstance(x, Parameter)}


def _without(passed, values):
    return [None if i in passed else x for i, x in enumerate(values)]


def _with(passed, values):
    return [passed.get(i, x) for i, x in enumerate(values)]


def scan_rule(equation: Equation, operands: Values) -> list[Any]:
    """`lax.scan`: stacked parameters are sliced, others stay as they are outside of the loop."""
    params, program, options = equation.params, called_program(equation.params), equation.options
    num_consts, num_carried = scan_counts(params)
    consts, rest = operands[:num_consts], operands[num_consts:]
    init, xs = rest[:num_carried], rest[num_carried:]
    passed = _passed(equation, operands)
    init = _carried(equation, passed, init)
    bodies, sliced = _opened(xs)
    sliced = [unstackable(x) for x in sliced]
    steps = None if options.key is None else jnp.arange(params["length"])

    def body(carry, slices):
        step, slices = slices
        carried = map(_reopened, _with(passed, carry))
        values = [*map(_reopened, consts), *carried, *bodies(slices)]
        out = evaluate(program, values, options.at_step(step))
        out = _without(passed, out)
        carry = _carried_on(equation, out[:num_carried])
        return carry, as_arrays(out[num_carried:], equation, "an output of a loop is an array")

    carry, outputs = scan(body, init, (steps, sliced), **scan_options(params))
    return _with(passed, [*carry, *outputs])


def _carried(equation, passed, values):
    """Values that a loop starts from, as arrays; those that it keeps are left out."""
    why = "the loop carries it, and returns another array in its place"
    return as_arrays(_without(passed, values), equation, why)


def _carried_on(equation, values):
    """Values after a step of a loop, as arrays."""
    return as_arrays(values, equation, "the loop returns it in place of an array that it carries")


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
    length = q.codes.shape[0]

    def one_per_layer(x):
        return None if x is None else repeat_blocks(x, 0, length // max(x.shape[0], 1))

    return dataclasses.replace(
        q,
        scale=unstackable(one_per_layer(q.scale)),
        zero_point=one_per_layer(q.zero_point),
        offset=unstackable(one_per_layer(q.offset)),
        inputs=q.inputs and _stacked_inputs(q.inputs, length),
    )


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
        permutation=repeat(inputs.permutation, 1),
        rotation=jax.tree.map(lambda signs: repeat(signs, 1), inputs.rotation),
    )


def while_rule(equation: Equation, operands: Values) -> list[Any]:
    """`lax.while_loop`."""
    params, options = equation.params, equation.options
    condition, body = closed(params["cond_jaxpr"]), closed(params["body_jaxpr"])
    first, second = while_counts(params)
    cond_consts, body_consts = operands[:first], operands[first : first + second]
    passed = _passed(equation, operands)
    init = _carried(equation, passed, operands[first + second :])

    def opened(consts, carry):
        return [*map(_reopened, consts), *map(_reopened, _with(passed, carry))]

    def goes_on(carry):
        return evaluate(condition, opened(cond_consts, carry), options)[0]

    def step(carry):
        out = evaluate(body, opened(body_consts, carry), options)
        return _carried_on(equation, _without(passed, out))

    return _with(passed, lax.while_loop(goes_on, step, init))


def cond_rule(equation: Equation, operands: Values) -> list[Any]:
    """`lax.cond`, `lax.switch` and `lax.platform_dependent`."""
    params, (index, *values) = equation.params, operands
    passed = _passed(equation, operands)
    bodies, values = _opened(values)

    def branch(program):
        def run(*values):
            out = evaluate(closed(program), bodies(values), equation.options)
            return as_arrays(_without(passed, out), equation, "the result of a branch is an array")

        return run

    branches = [branch(program) for program in params["branches"]]
    platforms = params.get("branches_platforms")
    if platforms is None:
        return _with(passed, lax.switch(index, branches, *values))
    named = {name: b for names, b in zip(platforms, branches, strict=True) for name in names or ()}
    default = next((b for names, b in zip(platforms, branches, strict=True) if not names), None)
    return _with(passed, lax.platform_dependent(*values, default=default, **named))


def shard_map_rule(equation: Equation, operands: Values) -> list[Any]:
    """`jax.shard_map`: codes are divided as the array is, scales where they can be."""
    params, program = equation.params, called_program(equation.params)
    bodies, _ = _opened(operands)
    given = zip(operands, params["in_specs"], strict=True)
    pairs = [specs(x, spec, params["mesh"]) for x, spec in given]

    def body(*values):
        out = evaluate(program, bodies(values), equation.options)
        return as_arrays(out, equation, "its result is an array")

    return jax.shard_map(
        body,
        in_specs=tuple(spec for _, spec in pairs),
        out_specs=list(params["out_specs"]),
        **shard_map_options(params),
    )(*(value for value, _ in pairs))
