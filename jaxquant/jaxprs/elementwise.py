"""Parts of a program that compute each element of arrays from the same element of others."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jax.extend.core import primitives as p

from .evaluate import live_equations

# Operands are scalars or have the shape of the result, on which no parameter depends.
_ELEMENTWISE = frozenset(
    (
        *(p.abs_p, p.add_p, p.and_p, p.atan2_p, p.cbrt_p, p.ceil_p),
        *(p.clamp_p, p.copy_p, p.convert_element_type_p, p.cos_p, p.div_p, p.eq_p),
        *(p.erf_p, p.exp2_p, p.exp_p, p.expm1_p, p.floor_p, p.ge_p),
        *(p.gt_p, p.integer_pow_p, p.is_finite_p, p.le_p, p.log1p_p, p.log_p),
        *(p.logistic_p, p.lt_p, p.max_p, p.min_p, p.mul_p, p.ne_p),
        *(p.neg_p, p.not_p, p.or_p, p.pow_p, p.rem_p, p.round_p),
        *(p.rsqrt_p, p.select_n_p, p.sign_p, p.sin_p, p.sqrt_p, p.square_p),
        *(p.sub_p, p.tanh_p, p.xor_p),
    )
)

_Atom = Var | Literal


@dataclasses.dataclass(frozen=True, eq=False)
class ElementwisePart:
    """Results of a program, computed element by element from arrays of the same shape.

    Attributes:
        shape: of the arrays and results.
        arrays: variables of this shape that it starts from, inputs first.
        scalars: variables without axes that it uses.
        places: which results of the program it computes.
        program: computes them, from the arrays and the scalars.
    """

    shape: tuple[int, ...]
    arrays: tuple[Var, ...]
    scalars: tuple[Var, ...]
    places: tuple[int, ...]
    program: ClosedJaxpr

    @property
    def dtypes(self) -> list[Any]:
        """Those of the results."""
        return [_aval(v).dtype for v in self.program.jaxpr.outvars]

    def compute(self, arrays: Sequence[Any], scalars: Sequence[Any]) -> list[Any]:
        """The results."""
        return run_program(self.program, [*arrays, *scalars])


def elementwise_parts(program: ClosedJaxpr, inputs: Collection[int]) -> list[ElementwisePart]:
    """The parts that compute results of a program from some of its inputs.

    Results that share such an input are in the same part. What is used elsewhere, too, is computed
    in each place.

    Args:
        program: the program.
        inputs: places of the inputs; results that depend on none of them are not in a part.
    """
    jaxpr = program.jaxpr
    makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    order = {id(eqn): i for i, eqn in enumerate(jaxpr.eqns)}
    roots = {jaxpr.invars[i] for i in inputs}
    found: list[tuple[set[Var], list[int], dict[int, JaxprEqn], dict[Var, None]]] = []
    for place, result in enumerate(jaxpr.outvars):
        if isinstance(result, Literal) or not _is_elementwise_result(result, makers):
            continue
        equations, uses = _traced_back(result, makers)
        shared = {v for v in uses if v in roots and _aval(v).shape == _aval(result).shape}
        if not shared:
            continue
        places = [place]
        for part in [part for part in found if part[0] & shared]:
            found.remove(part)
            shared, places = shared | part[0], part[1] + places
            equations, uses = part[2] | equations, part[3] | uses
        found.append((shared, places, equations, uses))
    # Inputs come first, in their order, then what other equations compute.
    known = {v: i for i, v in enumerate((*jaxpr.invars, *jaxpr.constvars))}

    def part_of(places, equations, uses):
        shape = _aval(jaxpr.outvars[places[0]]).shape
        sources = sorted(uses, key=lambda v: known.get(v, len(known)))
        arrays = tuple(v for v in sources if _aval(v).shape == shape)
        scalars = tuple(v for v in sources if _aval(v).shape == ())
        body = jaxpr.replace(
            constvars=[],
            invars=[*arrays, *scalars],
            outvars=[jaxpr.outvars[i] for i in places],
            eqns=sorted(equations.values(), key=lambda eqn: order[id(eqn)]),
        )
        return ElementwisePart(shape, arrays, scalars, tuple(places), ClosedJaxpr(body, []))

    return [part_of(places, equations, uses) for _, places, equations, uses in found]


def remaining_program(
    program: ClosedJaxpr, parts: Sequence[ElementwisePart]
) -> tuple[ClosedJaxpr, list[int], list[Var]]:
    """What is left of a program without its elementwise parts.

    Returns:
        The program, which returns what the parts use but inputs, then the results that are in no
        part; the places of its inputs that it uses; and the variables that the parts use.
    """
    jaxpr = program.jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    used = dict.fromkeys(v for part in parts for v in (*part.arrays, *part.scalars))
    computed = [v for v in used if v not in given]
    done = {place for part in parts for place in part.places}
    others = [v for place, v in enumerate(jaxpr.outvars) if place not in done]
    rest = jaxpr.replace(outvars=[*computed, *others])
    rest = rest.replace(eqns=live_equations(rest))
    atoms = [*rest.outvars, *(v for eqn in rest.eqns for v in eqn.invars)]
    needed = {v for v in atoms if isinstance(v, Var)}
    places = [i for i, v in enumerate(jaxpr.invars) if v in needed]
    rest = rest.replace(invars=[jaxpr.invars[i] for i in places])
    return ClosedJaxpr(rest, program.consts), places, computed


def run_program(program: ClosedJaxpr, values: Sequence[Any]) -> list[Any]:
    """The results of a program."""
    return jaxpr_as_fun(program)(*values)


def _aval(v: _Atom) -> Any:
    return v.aval


def _is_elementwise_result(v: _Atom, makers: dict[Var, JaxprEqn]) -> bool:
    eqn = None if isinstance(v, Literal) else makers.get(v)
    return eqn is not None and bool(_aval(v).shape) and _is_elementwise(eqn, _aval(v).shape)


def _traced_back(
    result: Var, makers: dict[Var, JaxprEqn]
) -> tuple[dict[int, JaxprEqn], dict[Var, None]]:
    """The elementwise equations that lead to a result, and the variables that they start from."""
    equations, uses, pending, seen = {}, {}, [result], {result}
    while pending:
        v = pending.pop()
        eqn = makers.get(v)
        if eqn is None or not _is_elementwise(eqn, _aval(result).shape):
            uses[v] = None
            continue
        equations[id(eqn)] = eqn
        new = [x for x in eqn.invars if isinstance(x, Var) and x not in seen]
        seen.update(new)
        pending += new
    return equations, uses


def _is_elementwise(eqn: JaxprEqn, shape: tuple[int, ...]) -> bool:
    """Whether an equation computes each element of arrays of this shape by itself."""
    if eqn.effects or any(_aval(v).shape != shape for v in eqn.outvars):
        return False
    return _has_shapes(eqn, shape) and _keeps_elements(eqn, shape)


def _keeps_elements(eqn, shape):
    if eqn.primitive is p.jit_p:
        inner = eqn.params["jaxpr"]
        has_arrays = any(map(jnp.ndim, inner.consts))
        return not has_arrays and all(_is_of_elements(e, shape) for e in inner.jaxpr.eqns)
    # Of a scalar, since operands have no other shapes.
    return eqn.primitive in _ELEMENTWISE or eqn.primitive is p.broadcast_in_dim_p


def _is_of_elements(eqn, shape):
    """`_is_elementwise` for an equation of a jitted function, which may also be one of scalars."""
    is_scalar = all(_aval(v).shape == () for v in (*eqn.invars, *eqn.outvars))
    return (is_scalar and not eqn.effects) or _is_elementwise(eqn, shape)


def _has_shapes(eqn, shape):
    return all(_aval(v).shape in ((), shape) for v in eqn.invars)
