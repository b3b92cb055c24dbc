"""Evaluation of the equations of a jaxpr: one run of them, or one after another by rules."""

import collections
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from .params import line_of, user_line


def live_equations(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """The equations whose results are used or that have effects, in order."""
    used = {v for v in jaxpr.outvars if isinstance(v, Var)}
    found = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not used.isdisjoint(eqn.outvars):
            used.update(v for v in eqn.invars if isinstance(v, Var))
            found.append(eqn)
    return found[::-1]


@contextlib.contextmanager
def context_of(eqn: JaxprEqn) -> Iterator[None]:
    """A context in which operations get the source line, scopes and settings of an equation.

    The line stays that of the enclosing equation if every call that made it is in a library.
    """
    made, around = eqn.source_info, source_info_util.current()
    traceback = (made if user_line(eqn) else around).traceback
    scopes = source_info_util.current_name_stack() + made.name_stack
    with (
        source_info_util.user_context(traceback, name_stack=scopes),
        eqn.ctx.manager,
    ):
        yield


def current_line() -> str:
    """ "file:line" of the user's code that operations are attributed to now; empty if unknown."""
    return line_of(source_info_util.current().traceback)


class Environment:
    """The values of a program's variables while its equations are evaluated in order.

    Equations that are deferred are evaluated together, as one program, once a result is needed.

    Args:
        program: the program.
        values: one for each of its inputs; anything.
    """

    def __init__(self, program: ClosedJaxpr, values: Sequence[Any]):
        self.jaxpr: Jaxpr = program.jaxpr
        self.equations: list[JaxprEqn] = live_equations(self.jaxpr)
        variables = [*self.jaxpr.constvars, *self.jaxpr.invars]
        self._values = dict(zip(variables, [*program.consts, *values], strict=True))
        self._makers = {}
        self._pending = []
        atoms = [*self.jaxpr.outvars, *(v for eqn in self.equations for v in eqn.invars)]
        self._uses = collections.Counter(v for v in atoms if isinstance(v, Var))

    def read(self, atoms: Sequence[Var | Literal]) -> list[Any]:
        """The values of variables and literals."""
        self._flush()
        return [v.val if isinstance(v, Literal) else self._values[v] for v in atoms]

    def peek(self, atom: Any) -> Any:
        """The value of a variable that is there already, else None."""
        return None if isinstance(atom, Literal) else self._values.get(atom)

    def maker(self, atom: Any) -> Any:
        """The equation whose result a variable is; None for inputs and literals."""
        return None if isinstance(atom, Literal) else self._makers.get(atom)

    def defer(self, eqn: JaxprEqn) -> None:
        """Evaluates an equation later, as it is."""
        self._pending.append(eqn)
        self._made(eqn)

    def write(self, eqn: JaxprEqn, values: Sequence[Any]) -> None:
        """Sets the results of an equation that was evaluated."""
        self._values.update(zip(eqn.outvars, values, strict=True))
        self._made(eqn)

    def evaluate(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        """The results of one equation for these operands."""
        operands = {v: x for v, x in zip(eqn.invars, values, strict=True) if isinstance(v, Var)}
        return self._run([eqn], operands, eqn.outvars)

    def outputs(self) -> list[Any]:
        """The results of the program, once each of its equations was deferred or written."""
        return self.read(self.jaxpr.outvars)

    def _made(self, eqn):
        self._uses.subtract(v for v in eqn.invars if isinstance(v, Var))
        self._makers.update((v, eqn) for v in eqn.outvars)

    def _flush(self):
        """Evaluates what was deferred."""
        run, self._pending = self._pending, []
        if not run:
            return
        made = dict.fromkeys(v for eqn in run for v in eqn.outvars)
        needed = dict.fromkeys(v for eqn in run for v in eqn.invars if isinstance(v, Var))
        later = [v for v in made if self._uses[v] > 0]
        operands = {v: self._values[v] for v in needed if v not in made}
        self._values.update(zip(later, self._run(run, operands, later), strict=True))

    def _run(self, eqns, operands, outvars):
        inputs, outputs = list(operands), list(outvars)
        part = self.jaxpr.replace(constvars=(), invars=inputs, outvars=outputs, eqns=eqns)
        return jaxpr_as_fun(ClosedJaxpr(part, ()))(*operands.values())
