"""Each fact about JAX's primitives, on the version of JAX that runs the tests."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxquant.jaxprs import params

X = jnp.arange(12.0).reshape(4, 3)
WIDE = jnp.ones((4, 3, 2))


def equations(function, *args):
    return jax.make_jaxpr(function)(*args).jaxpr.eqns


def equation(function, *args, name):
    (found,) = (eqn for eqn in equations(function, *args) if eqn.primitive.name == name)
    return found


def shapes(variables) -> list[Any]:
    return [None if v is None else v.aval.shape for v in variables]


def loop(x, xs):
    """A `scan` with one constant, two carried arrays and two that are sliced."""
    bias = x.sum(1)

    def step(carry, parts):
        total, count = carry
        a, b = parts
        return (total + a * bias.sum(), count + 1), b

    return lax.scan(step, (x[0], 0), (x, xs), reverse=True, unroll=2)


def transposed(x):
    """The transpose of a `scan`, whose parameters another rule of JAX makes."""

    def linear(y):
        return lax.scan(lambda c, a: (c + 2 * a, c), y[0], y)

    return jax.linear_transpose(linear, x)((x[0], x))


def test_operands_of_a_scan_are_counted_by_their_role():
    eqn = equation(loop, X, WIDE, name="scan")
    constants, carried = params.scan_counts(eqn.params)
    roles = shapes(eqn.invars)
    assert roles[:constants] == [(4,)]
    assert set(roles[constants : constants + carried]) == {(), (3,)}
    assert carried == 2
    assert roles[constants + carried :] == [(4, 3), (4, 3, 2)]
    assert params.count_before_slices(eqn) == 3


def test_operands_of_a_transposed_scan_are_counted_by_their_role():
    eqn = equation(transposed, X, name="scan")
    constants, carried = params.scan_counts(eqn.params)
    assert (constants, carried) == (0, 1)
    assert shapes(eqn.invars[params.count_before_slices(eqn) :]) == [(4, 3)][: len(eqn.invars) - 1]


def test_a_loop_without_slices_slices_nothing():
    eqn = equation(lambda x: lax.fori_loop(0, 3, lambda i, c: c + x, x), X, name="scan")
    assert params.count_before_slices(eqn) == len(eqn.invars)
    (eqn,) = equations(jnp.sin, X)
    assert params.count_before_slices(eqn) == 1


def test_the_options_of_a_scan_are_those_of_the_call():
    eqn = equation(loop, X, WIDE, name="scan")
    assert params.scan_options(eqn.params) == {"length": 4, "reverse": True, "unroll": 2}


@jax.custom_jvp
def with_jvp(x):
    return jnp.sin(x)


with_jvp.defjvps(lambda tangent, out, x: tangent)


@jax.custom_vjp
def with_vjp(x):
    return jnp.sin(x)


with_vjp.defvjp(lambda x: (with_vjp(x), x), lambda x, cotangent: (cotangent,))


def while_loop(x):
    """Three constants of the condition, one of the body; all shapes differ."""
    limit = x[:, 0].sum() + x[0, :2].sum() + x[:2, :2].sum()
    return lax.while_loop(lambda c: c.sum() < limit, lambda c: c + x[:3, 0], x[0])


def in_shards(x):
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("a")
    return jax.shard_map(jnp.sin, mesh=mesh, in_specs=spec, out_specs=spec)(x)


# Name: (function, shapes of the inputs of each inner jaxpr, how often each runs).
ONE = [[(4, 3)]]
CALLS = {
    "jit": (jax.jit(jnp.cumsum), ONE, [1]),
    "checkpoint": (jax.checkpoint(lambda x: jnp.sin(jnp.cos(x))), ONE, [1]),
    "custom_jvp": (with_jvp, ONE, [1]),
    "custom_vjp": (with_vjp, ONE, [1]),
    "shard_map": (in_shards, [[(2, 3)]], [1]),
    "composite": (lax.composite(lambda x: jnp.sin(x), name="test.sin"), ONE, [1]),
    "scan": (lambda x: lax.scan(lambda c, a: (c + a, a), x[0], x), [[(3,), (3,)]], [4]),
    "cond": (lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x), ONE * 2, [1, 1]),
    "switch": (lambda x: lax.switch(1, [jnp.sin, jnp.cos, jnp.tan], x), ONE * 3, [1, 1, 1]),
    "while_loop": (while_loop, [[(), (3,)], [(4, 3), (3,)]], [None, None]),
}


@pytest.mark.parametrize("name", CALLS)
def test_inner_jaxprs_know_their_operands(name):
    function, inputs, times = CALLS[name]
    found = [inner for eqn in equations(function, X) for inner in params.inner_jaxprs(eqn)]
    assert [shapes(inner.jaxpr.invars) for inner in found] == inputs
    assert [inner.times for inner in found] == times
    for inner in found:
        assert len(inner.operands) == len(inner.jaxpr.invars)
        for variable, operand in zip(inner.jaxpr.invars, inner.operands, strict=True):
            ranks = {len(shape) for shape in shapes([variable, operand])}
            assert len(ranks) == 1 or name == "scan"


def test_operands_of_other_inner_jaxprs_are_not_known():
    def solve(a):
        return lax.custom_linear_solve(lambda v: a @ v, a[0], lambda _, b: b, symmetric=True)

    eqn = equation(solve, jnp.eye(3), name="custom_linear_solve")
    found = params.inner_jaxprs(eqn)
    assert len(found) > 1
    assert {operand for inner in found for operand in inner.operands} == {None}
    assert [len(inner.operands) for inner in found] == [len(i.jaxpr.invars) for i in found]


def test_the_branch_of_a_platform_is_known_and_a_value_decides_else():
    def run(x):
        return lax.platform_dependent(x, tpu=jnp.sin, cuda=jnp.cos, default=jnp.tan)

    eqn = equation(run, X, name="cond")
    found = {p: params.branch_for(eqn.params, p) for p in ("tpu", "cuda", "cpu", "rocm")}
    names = {
        p: [e.primitive.name for e in eqn.params["branches"][i].jaxpr.eqns]
        for p, i in found.items()
    }
    assert names == {"tpu": ["sin"], "cuda": ["cos"], "cpu": ["tan"], "rocm": ["tan"]}
    eqn = equation(CALLS["cond"][0], X, name="cond")
    assert params.branch_for(eqn.params, "cpu") is None
    (eqn,) = equations(jnp.sin, X)
    assert params.branch_for(eqn.params, "cpu") is None


def test_jitted_functions_have_names():
    @jax.jit
    def feed_forward(x):
        return jnp.sin(x)

    (call,) = equations(feed_forward, X)
    assert params.jit_name(call) == "feed_forward"
    assert params.jit_name(call.params["jaxpr"].jaxpr.eqns[0]) is None
    (call,) = equations(CALLS["checkpoint"][0], X)
    assert params.jit_name(call) is None


def test_equations_know_scopes_and_lines():
    def function(x):
        with jax.named_scope("layer"):
            return jax.lax.sin(x)

    (eqn,) = equations(function, X)
    assert params.name_stack(eqn) == "layer"
    line = function.__code__.co_firstlineno + 2
    assert params.user_line(eqn).endswith(f"test_params.py:{line}")
    assert params.line_of(None) == ""


def test_tracers_stand_for_arrays():
    seen = []
    jax.make_jaxpr(lambda x: seen.append(params.is_tracer(x)))(X)
    assert seen == [True]
    assert not params.is_tracer(X)
    assert not params.is_tracer(1.0)


def test_references_are_not_arrays():
    def run(x):
        reference = jax.new_ref(x)
        reference[0, 0] = 1.0
        return lax.scan(lambda c, _: (c + reference[0, 0], None), 0.0, None, length=2)[0]

    assert params.has_references(equation(run, X, name="scan"))
    assert not params.has_references(equation(loop, X, WIDE, name="scan"))


def test_other_equations_run_in_the_place_of_those_of_a_program():
    constant = jnp.float32(3)
    program = jax.make_jaxpr(lambda x: jnp.sin(x) * constant)(X)
    other = jax.make_jaxpr(jnp.cos)(X).jaxpr.eqns[0].primitive
    eqns = [
        eqn.replace(primitive=other) if eqn.primitive.name == "sin" else eqn
        for eqn in program.jaxpr.eqns
    ]
    changed = params.with_equations(program, eqns)
    names = [eqn.primitive.name for eqn in changed.jaxpr.eqns]
    assert names == ["cos", "mul"]
    assert [eqn.primitive.name for eqn in program.jaxpr.eqns] == ["sin", "mul"]
    assert len(changed.consts) == len(program.consts)


def test_options_of_programs_are_arguments_of_the_functions_that_make_them():
    policy = jax.checkpoint_policies.dots_saveable
    eqn = equation(jax.checkpoint(jnp.sin, policy=policy, prevent_cse=False), X, name="remat2")
    assert params.remat_options(eqn.params) == {"policy": policy, "prevent_cse": False}

    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    mapped = jax.shard_map(
        jnp.sin, mesh=mesh, in_specs=jax.P("a"), out_specs=jax.P("a"), axis_names={"a"}
    )
    eqn = equation(jax.jit(mapped), X, name="jit")
    (eqn,) = (e for e in params.called_program(eqn.params).jaxpr.eqns if "mesh" in e.params)
    options = params.shard_map_options(eqn.params)
    assert options["axis_names"] == {"a"}
    assert options["mesh"].axis_names == ("a", "b")
    assert options["check_vma"]


def test_constants_of_a_while_are_counted_by_where_they_are_used():
    limit, step = X.sum(), X[0]
    eqn = equation(
        lambda x, n, s: lax.while_loop(lambda c: c.sum() < n, lambda c: c + s, x),
        X[0], limit, step, name="while",
    )  # fmt: skip
    assert params.while_counts(eqn.params) == (1, 1)


def test_a_call_has_one_sharding_or_none_for_each_operand_and_result():
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P())
    fn = jax.jit(jnp.add, in_shardings=(sharding, None))
    assert params.call_shardings(equation(fn, X, X, name="jit")) == ([sharding, None], [None])
    fn = jax.jit(jnp.sin, out_shardings=sharding)
    assert params.call_shardings(equation(fn, X, name="jit")) == ([None], [sharding])
    assert params.call_shardings(equation(jnp.sin, X, name="sin")) == ([None], [None])


def test_what_a_loop_starts_from_is_found_among_its_operands():
    fn = lambda x, y, z: lax.scan(lambda c, z: (c + y, z), x, z)  # noqa: E731
    assert params.carried_operands(equation(fn, X[0], X[0], X, name="scan")) == range(1, 2)
    fn = lambda x, y, n: lax.while_loop(lambda c: c.sum() < n, lambda c: c + y, x)  # noqa: E731
    assert params.carried_operands(equation(fn, X, X, X.sum(), name="while")) == range(2, 3)
    assert not params.carried_operands(equation(jnp.sin, X, name="sin"))


def test_broadcasts_say_where_their_axes_went():
    eqn = equation(lambda x: lax.broadcast_in_dim(x, (2, 4, 3), (1, 2)), X, name="broadcast_in_dim")
    assert params.broadcast_axes(eqn) == (1, 2)
    assert params.broadcast_axes(equation(jnp.sin, X, name="sin")) is None
