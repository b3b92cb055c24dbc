"""Translates elementwise parts of programs into steps that a native kernel runs row by row."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal
from jax.extend.core import primitives as p

from .elementwise import ElementwisePart
from .evaluate import context_of

_SAME = (p.copy_p, p.broadcast_in_dim_p)
# Operations on bfloat16 whose results need no rounding.
_EXACT = frozenset(
    ("copy", "negate", "magnitude", "sign", "maximum", "minimum", "select", "round_to_bfloat16")
)
_PRODUCTS = ("multiply",)
_SIGNS = {"add": 1, "subtract": -1}  # of the second operand
_MOST_POWER = 8
_MOST_STEPS = 256


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation on rows of float32. Hashable.

    Attributes:
        operation: one that `kernels.cpu.update_blocks` has. Those with one operand are of a row;
            those with two, of at least one row. "select" is of (which, if it is 0, otherwise),
            "combine" of (row, scalar, row, scalar), the sum of two products. Comparisons are 1 or
            0.
        out: slot of the result; not one of the operands, and not that of an input.
        operands: slots, or -1 - the number of a scalar.
    """

    operation: str
    out: int
    operands: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row of elements, by number: those of arrays first, then the result of each step."""

    number: int


_Rule = Callable[..., Any]


class _Unsupported(Exception):
    """The kernel does not have an operation or a dtype."""


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """A part as `kernels.cpu.update_blocks` runs it.

    Attributes:
        steps: in order. Slots are those of `part.arrays`, then of the results, then others.
        scalars: float32 ().
    """

    steps: tuple[Step, ...]
    scalars: tuple[jax.Array, ...]


def steps_of(part: ElementwisePart, scalars: Sequence[jax.Array]) -> Steps | None:
    """The steps of a part, or None if the kernel does not have its operations or dtypes.

    Args:
        part: the part.
        scalars: values of `part.scalars`. What is computed of scalars alone is left to XLA.
    """
    count, outputs = len(part.arrays), part.program.jaxpr.outvars
    builder = _Builder(count)
    try:
        _check(outputs, jnp.float32, jnp.bfloat16)
        results = builder.run(part.program, [*map(_Row, range(count)), *scalars])
        rows = [builder.output(x) for x in results]
    except _Unsupported:
        return None
    if len(builder.steps) > _MOST_STEPS:
        return None
    builder.combine(rows)
    return Steps(_with_slots(builder.steps, count, rows), tuple(builder.scalars))


class _Builder:
    """Steps whose results are numbered, without an end."""

    def __init__(self, count: int):
        self.steps: list[Step] = []
        self.scalars: list[jax.Array] = []
        self._count = count
        self._outputs: set[int] = set()

    def run(self, program: ClosedJaxpr, given: Sequence[Any]) -> list[Any]:
        """The results of a program, rows and scalars, from such."""
        jaxpr = program.jaxpr
        values = dict(zip(jaxpr.invars, given, strict=True))
        values |= dict(zip(jaxpr.constvars, program.consts, strict=True))

        def value(atom):
            return atom.val if isinstance(atom, Literal) else values[atom]

        for eqn in jaxpr.eqns:
            found = self._results(eqn, list(map(value, eqn.invars)))
            values.update(zip(eqn.outvars, found, strict=True))
        return list(map(value, jaxpr.outvars))

    def output(self, value: Any) -> int:
        """The number of a row that is an output, and nothing else."""
        row = self._filled(value)
        if row.number < self._count or row.number in self._outputs:
            row = self.add("copy", row)
        self._outputs.add(row.number)
        return row.number

    def combine(self, outputs: Sequence[int]) -> None:
        """Joins sums of rows with the multiplications by scalars before them, used nowhere else."""
        uses = collections.Counter([*outputs, *(x for step in self.steps for x in step.operands)])
        scaled = {}
        for step in self.steps:
            rows, scalars = ([x for x in step.operands if (x >= 0) == c] for c in (True, False))
            if step.operation in _PRODUCTS and scalars and uses[step.out] == 1:
                scaled[step.out] = rows[0], scalars[0]
        found, joined = [], set()
        for step in self.steps:
            is_sum = step.operation in _SIGNS and min(step.operands) >= 0
            factors = scaled.keys() & set(step.operands) if is_sum else set()
            joined |= factors
            found.append(self._combined(step, scaled) if factors else step)
        self.steps = [step for step in found if step.out not in joined]

    def _combined(self, step: Step, scaled: Mapping[int, tuple[int, int]]) -> Step:
        """A sum or difference of rows, of which some are rows times scalars, as one step."""
        (x, a), (y, b) = (scaled.get(row) or (row, self._operand(1.0)) for row in step.operands)
        if _SIGNS[step.operation] < 0:
            b = self._operand(-self.scalars[-1 - b])
        return Step("combine", step.out, (x, a, y, b))

    def _results(self, eqn: Any, given: list[Any]) -> list[Any]:
        if eqn.primitive is p.jit_p:
            return self.run(eqn.params["jaxpr"], given)
        if any(isinstance(x, _Row) for x in given):
            return [self._row(eqn, given)]
        if eqn.primitive in _SAME:
            return given
        with context_of(eqn):
            found = eqn.primitive.bind(*given, **eqn.params)
        return found if eqn.primitive.multiple_results else [found]

    def _row(self, eqn: Any, given: list[Any]) -> _Row:
        """The result of an equation of rows, rounded if it is of bfloat16."""
        dtypes = jnp.float32, jnp.bfloat16, jnp.bool_
        _check((*eqn.invars, *eqn.outvars), *dtypes)
        row = self._computed(eqn, given)
        is_new = row.number >= self._count
        is_exact = is_new and self.steps[row.number - self._count].operation in _EXACT
        was_narrow = all(v.aval.dtype in dtypes[1:] for v in eqn.invars)
        if eqn.outvars[0].aval.dtype == jnp.bfloat16 and not (was_narrow and is_exact):
            return self.add("round_to_bfloat16", row)
        return row

    def _computed(self, eqn: Any, given: list[Any]) -> _Row:
        rule = _RULES.get(eqn.primitive)
        if rule is None:
            raise _Unsupported
        return rule(self, eqn.params, *given)

    def add(self, operation: str, *operands: Any) -> _Row:
        """The result of one more step, of rows and scalars."""
        if not any(isinstance(x, _Row) for x in operands):
            operands = self._filled(operands[0]), *operands[1:]
        return self._append(operation, operands)

    def _filled(self, value: Any) -> _Row:
        """A row, perhaps filled with a scalar: only "select" is of scalars, too."""
        return value if isinstance(value, _Row) else self._append("select", [value] * 3)

    def _append(self, operation: str, operands: Sequence[Any]) -> _Row:
        out = self._count + len(self.steps)
        self.steps.append(Step(operation, out, tuple(map(self._operand, operands))))
        return _Row(out)

    def _operand(self, value: Any) -> int:
        if isinstance(value, _Row):
            return value.number
        self.scalars.append(jnp.asarray(value).astype(jnp.float32))
        return -len(self.scalars)


def _operation(name: str) -> _Rule:
    return lambda builder, params, *given: builder.add(name, *given)


def _swapped(name: str) -> _Rule:
    return lambda builder, params, x, y: builder.add(name, y, x)


def _same(builder: _Builder, params: Any, x: Any) -> Any:
    return x


def _converted(builder: _Builder, params: Any, x: Any) -> Any:
    is_truth = params["new_dtype"] == jnp.bool_
    return _differs(builder, params, x, 0.0) if is_truth else x


def _quotient(builder: _Builder, params: Any, x: Any, y: Any) -> _Row:
    if isinstance(y, _Row):
        return builder.add("divide", x, y)
    # Processors take many times as long to divide.
    return builder.add("multiply", x, 1 / jnp.asarray(y, jnp.float32))


def _power(builder: _Builder, params: Any, x: Any) -> _Row:
    """By repeated squaring, as XLA computes it."""
    found, square, left = None, x, abs(params["y"])
    if not 0 < left <= _MOST_POWER:
        raise _Unsupported
    while left:
        if left % 2:
            found = square if found is None else builder.add("multiply", found, square)
        left //= 2
        if left:
            square = builder.add("multiply", square, square)
    assert found is not None
    return found if params["y"] > 0 else builder.add("divide", 1.0, found)


def _clamped(builder: _Builder, params: Any, low: Any, x: Any, high: Any) -> _Row:
    return builder.add("minimum", builder.add("maximum", low, x), high)


def _selected(builder: _Builder, params: Any, which: Any, *cases: Any) -> _Row:
    if len(cases) != 2:
        raise _Unsupported
    return builder.add("select", which, *cases)


def _differs(builder: _Builder, params: Any, x: Any, y: Any) -> _Row:
    return builder.add("subtract", 1.0, builder.add("equal", x, y))


def _finite(builder: _Builder, params: Any, x: Any) -> _Row:
    largest = float(jnp.finfo(jnp.float32).max)
    return builder.add("less_or_equal", builder.add("magnitude", x), largest)


# (builder, parameters of the equation, its operands) -> the result.
_RULES: dict[Any, _Rule] = {
    p.add_p: _operation("add"),
    p.sub_p: _operation("subtract"),
    p.mul_p: _operation("multiply"),
    p.div_p: _quotient,
    p.max_p: _operation("maximum"),
    p.min_p: _operation("minimum"),
    p.neg_p: _operation("negate"),
    p.abs_p: _operation("magnitude"),
    p.sqrt_p: _operation("root"),
    p.sign_p: _operation("sign"),
    p.square_p: lambda builder, params, x: builder.add("multiply", x, x),
    p.integer_pow_p: _power,
    p.rsqrt_p: lambda builder, params, x: builder.add("divide", 1.0, builder.add("root", x)),
    p.clamp_p: _clamped,
    p.eq_p: _operation("equal"),
    p.ne_p: _differs,
    p.lt_p: _operation("less"),
    p.le_p: _operation("less_or_equal"),
    p.gt_p: _swapped("less"),
    p.ge_p: _swapped("less_or_equal"),
    p.is_finite_p: _finite,
    # Of ones and zeros.
    p.and_p: _operation("multiply"),
    p.or_p: _operation("maximum"),
    p.not_p: lambda builder, params, x: builder.add("subtract", 1.0, x),
    p.select_n_p: _selected,
    p.convert_element_type_p: _converted,
    **dict.fromkeys(_SAME, _same),
}


def _check(variables: Sequence[Any], *dtypes: Any) -> None:
    """Raises _Unsupported for other dtypes."""
    if any(v.aval.dtype not in dtypes for v in variables):
        raise _Unsupported


def _with_slots(steps: Sequence[Step], inputs: int, outputs: Sequence[int]) -> tuple[Step, ...]:
    """The steps with as few slots as their results need."""
    last = {x: i for i, step in enumerate(steps) for x in step.operands}
    slots = {number: number for number in range(inputs)}
    slots |= {number: inputs + place for place, number in enumerate(outputs)}
    fixed, free, count, found = set(slots.values()), [], inputs + len(outputs), []
    for i, step in enumerate(steps):
        if step.out not in slots:
            if not free:
                free.append(count)
                count += 1
            slots[step.out] = free.pop()
        operands = tuple(slots[x] if x >= 0 else x for x in step.operands)
        found.append(Step(step.operation, slots[step.out], operands))
        # After the result has its slot, because the kernel does not write over operands.
        done = {x for x in (*step.operands, step.out) if x >= 0 and last.get(x, i) == i}
        free += sorted(slots[x] for x in done if slots[x] not in fixed)
    return tuple(found)
