"""Evaluation of a program some of whose values are quantized.

Equations without a quantized operand are evaluated as they are. Others are evaluated by the rule
of their primitive, which gets these operands as Parameters. Where there is no rule, or it raises
Unsupported, the operands are dequantized.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from ..jaxprs import (
    Environment,
    closed,
    context_of,
    count_before_slices,
    current_line,
    is_marking,
    mark,
    naming,
)
from ..ops import Dequantization
from .parameter import Parameter, Tagged, Unsupported


class WouldDequantizeError(ValueError):
    """A parameter would be dequantized, although that is not allowed.

    Attributes:
        place: which one, where, and why.
    """

    def __init__(self, place: str):
        super().__init__(
            f"strict=True does not allow to dequantize a parameter; got {place}. Leave it in "
            "float, or use strict=False."
        )
        self.place = place


@dataclasses.dataclass(frozen=True)
class Options:
    """How a function is evaluated.

    Attributes:
        strict: whether it is an error to dequantize.
        implementation: that of each product; None selects it.
        rules: (Equation, operands) -> results, by the name of a primitive.
        key: random key for rules that round stochastically, another one in each step of a scan.
    """

    strict: bool
    implementation: str | None
    rules: Mapping[str, Callable[["Equation", Sequence[Any]], Sequence[Any]]]
    key: jax.Array | None = None

    def at_step(self, step: jax.Array | None) -> "Options":
        """The options in one step of a loop."""
        if self.key is None or step is None:
            return self
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, step))


def evaluate(program: Any, values: Sequence[Any], options: Options) -> list[Any]:
    """The results of a program, of which those that it only passes on may be Parameters.

    Args:
        program: a jaxpr, with its constants or without any.
        values: arrays and Parameters, one per input.
        options: as above.

    Raises:
        WouldDequantizeError: a parameter would be dequantized, and `options.strict`.
    """
    environment = Environment(closed(program), values)
    for eqn in environment.equations:
        if any(isinstance(environment.peek(v), Parameter) for v in eqn.invars):
            _evaluate_quantized(environment, eqn, options)
        else:
            environment.defer(eqn)
    return environment.outputs()


def _evaluate_quantized(environment, eqn, options):
    operands = environment.read(eqn.invars)
    path = next(x.path for x in operands if isinstance(x, Parameter))
    with context_of(eqn), naming(path):
        try:
            rule = options.rules.get(eqn.primitive.name)
            if rule is None:
                raise Unsupported("it has no form for quantized arrays")
            out = rule(Equation(eqn, environment, options), operands)
        except Unsupported as error:
            arrays = [as_array(x, eqn, str(error), options) for x in operands]
            out = environment.evaluate(eqn, arrays)
    environment.write(eqn, out)


@dataclasses.dataclass(frozen=True)
class Equation:
    """An equation with a quantized operand, as a rule gets it."""

    eqn: Any
    environment: Environment
    options: Options

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the primitive."""
        return self.eqn.params

    def count_before_slices(self) -> int:
        """How many operands of a loop come before those that it slices."""
        return count_before_slices(self.eqn)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the results."""
        return [v.aval.shape for v in self.eqn.outvars]


def as_array(x: Any, eqn: Any, why: str, options: Options) -> Any:
    """A value as an array. A Parameter is dequantized, and a record says so, unless it is a row.

    Args:
        x: an array or a Parameter.
        eqn: the equation that needs an array, or None if it is the result of the function.
        why: the reason, for the record.
        options: as for `evaluate`.

    Raises:
        WouldDequantizeError: x is a Parameter, and `options.strict`.
    """
    if not isinstance(x, Parameter):
        return x
    if isinstance(x.value, Tagged):
        return x.value.array
    if x.is_row:
        return x.dequantize()
    primitive = "return" if eqn is None else eqn.primitive.name
    if options.strict:
        line = "the end" if eqn is None else current_line() or "an unknown line"
        raise WouldDequantizeError(f"{x.path} in {primitive} at {line}: {why}")
    array = x.dequantize()
    if not is_marking():
        return array
    record = Dequantization(x.path, primitive, why, x.value.nbytes)
    return mark(array, array, array, lambda: record)
