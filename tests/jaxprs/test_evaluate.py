"""The parts of a program, evaluated one after another."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.jaxprs import Environment, closed, context_of, live_equations, params

X = jnp.arange(6.0).reshape(2, 3)


def program_of(function, *args):
    return jax.make_jaxpr(function)(*args)


def names(eqns):
    return [eqn.primitive.name for eqn in eqns]


def test_equations_without_use_or_effect_are_left_out():
    def function(x):
        jnp.tan(jnp.exp(x))
        jax.debug.callback(lambda _: None, jnp.cos(x))
        return jnp.sin(x)

    found = names(live_equations(program_of(function, X).jaxpr))
    assert found == ["cos", "debug_callback", "sin"]


def test_a_program_can_be_evaluated_equation_by_equation_or_in_runs():
    constant = np.full((2, 3), 2.0, np.float32)

    def function(x):
        y = jnp.sin(x) * constant
        z = jnp.cos(y)
        return z + y, x, jnp.exp(z)

    program = program_of(function, X)
    for place in range(len(program.jaxpr.eqns)):
        environment = Environment(program, [X])
        for i, eqn in enumerate(environment.equations):
            if i == place:
                values = environment.read(eqn.invars)
                environment.write(eqn, environment.evaluate(eqn, values))
                assert environment.maker(eqn.outvars[0]) is eqn
            else:
                environment.defer(eqn)
        for found, expected in zip(environment.outputs(), function(X), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_values_are_there_only_once_they_were_evaluated():
    program = program_of(lambda x: jnp.sin(jnp.cos(x)), X)
    environment = Environment(program, [X])
    first, second = environment.equations
    assert environment.peek(first.invars[0]) is X
    environment.defer(first)
    assert environment.peek(first.outvars[0]) is None
    environment.read(second.invars)
    np.testing.assert_allclose(environment.peek(first.outvars[0]), jnp.cos(X), rtol=1e-6)


def test_operations_get_the_line_the_scopes_and_the_settings_of_an_equation():
    def function(x):
        with jax.named_scope("inside"):
            return jnp.sin(x)

    (eqn,) = program_of(function, X).jaxpr.eqns

    def again(x):
        with jax.named_scope("outside"), context_of(eqn):
            return jnp.cos(x)

    (found,) = program_of(again, X).jaxpr.eqns
    assert params.name_stack(found) == "outside/inside"
    assert params.user_line(found) == params.user_line(eqn)
    assert "test_evaluate.py:" in params.user_line(found)


def test_open_programs_are_closed_and_closed_ones_stay():
    program = program_of(jax.checkpoint(jnp.sin), X)
    (eqn,) = program.jaxpr.eqns
    assert closed(program) is program
    inner = params.called_program(eqn.params)
    assert list(inner.consts) == []
    assert names(inner.jaxpr.eqns) == ["sin"]
    called = params.called_program(program_of(jax.jit(jnp.cos), X).jaxpr.eqns[0].params)
    assert names(called.jaxpr.eqns) == ["cos"]
    looped = program_of(lambda x: lax.scan(lambda c, y: (c, jnp.tan(y)), 0, x), X)
    assert names(params.called_program(looped.jaxpr.eqns[0].params).jaxpr.eqns) == ["tan"]
