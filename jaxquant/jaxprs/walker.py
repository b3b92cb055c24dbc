"""Walks over a jaxpr and its inner jaxprs, and replaces equations of a jaxpr."""

import dataclasses
from collections.abc import Callable, Iterator

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun

from .params import branch_for, inner_jaxprs, with_equations


@dataclasses.dataclass(frozen=True)
class Site:
    """An equation, and where it lies in a program.

    Attributes:
        eqn: the equation.
        within: the equations around it, the outermost first.
        times: how often the loops around it run it; None inside a `while_loop`.
    """

    eqn: JaxprEqn
    within: tuple[JaxprEqn, ...]
    times: int | None


def walk(
    program: ClosedJaxpr | Jaxpr,
    platform: str | None = None,
    within: tuple[JaxprEqn, ...] = (),
    times: int | None = 1,
) -> Iterator[Site]:
    """Every equation of a program, in order, each before those inside of it.

    A jaxpr that is called twice is walked twice, with the same variables.

    Args:
        program: from `jax.make_jaxpr`, or a jaxpr inside an equation.
        platform: one that `jax.lax.platform_dependent` names, to walk only the branches that it
            runs; None for all branches.
        within, times: as in `Site`, of the program itself.
    """
    for eqn in getattr(program, "jaxpr", program).eqns:
        yield Site(eqn, within, times)
        inner = inner_jaxprs(eqn)
        branch = None if platform is None else branch_for(eqn.params, platform)
        for jaxpr, _, trips in inner if branch is None else inner[branch : branch + 1]:
            repeated = None if times is None or trips is None else times * trips
            yield from walk(jaxpr, platform, (*within, eqn), repeated)


def with_replaced(
    program: ClosedJaxpr, replace: Callable[[JaxprEqn], JaxprEqn]
) -> Callable[..., list]:
    """The program as a function of its inputs, each of its outermost equations replaced."""
    return jaxpr_as_fun(with_equations(program, [replace(eqn) for eqn in program.jaxpr.eqns]))
