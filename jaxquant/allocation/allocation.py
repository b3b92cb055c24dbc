"""What `allocate` returns: a choice, why it was made, and what other budgets would give."""

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from ..tree import Rule
from ..tree.internal import to_text
from .knapsack import choose
from .picture import plot_allocation

if TYPE_CHECKING:
    import rich.table

# Budgets of a curve.
_POINTS = 64


@dataclasses.dataclass(frozen=True)
class AllocationRow:
    """One parameter of an `Allocation`.

    Attributes:
        path: of the parameter.
        shape: its shape.
        option: name of the option that it has; None before it is chosen.
        bits: of each option; inf for options that do not fit.
        scores: predicted loss of each option; inf likewise.
    """

    path: str
    shape: tuple[int, ...]
    option: str | None
    bits: tuple[float, ...]
    scores: tuple[float, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation:
    """An option for each parameter. Print it for a table.

    Attributes:
        rows: one per parameter.
        options: their names, in the order of the rows' bits and scores.
        budget: bits per weight that were allowed.
        rules: for `tree.quantize`, one per parameter; others are left in float.
        groups: indices of rows that share an option.

    Example:
        >>> params, config = {"w": jnp.eye(64)}, jq.ArrayConfig(format=jq.INT4)
        >>> found = jq.allocate(
        ...     lambda params, x: x @ params["w"], params, [jnp.ones((2, 64))], {"w4": config}
        ... )
        >>> found.rows[0].option, found.bits_per_weight, len(found.rules)
        ('w4', 4.5, 1)
    """

    rows: tuple[AllocationRow, ...]
    options: tuple[str, ...]
    budget: float
    rules: tuple[Rule, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Bits of all parameters over their number of elements."""
        bits = sum(row.bits[self._place(row)] for row in self.rows)
        return bits / self._elements

    @property
    def score(self) -> float:
        """The predicted loss: the sum of the scores."""
        return sum(row.scores[self._place(row)] for row in self.rows)

    def within(self, bits_per_weight: float) -> "Allocation":
        """The best choice within another budget, from the same scores and without rules.

        Raises:
            ValueError: the smallest options exceed the budget.
        """
        budget = bits_per_weight * self._elements
        bits = [np.sum([self.rows[i].bits for i in g], 0).tolist() for g in self.groups]
        scores = [np.sum([self.rows[i].scores for i in g], 0).tolist() for g in self.groups]
        try:
            picked = choose(bits, scores, budget)
        except ValueError as error:
            raise ValueError(
                f"bits_per_weight={bits_per_weight} is too few: {error}. Raise it, or add smaller "
                "options."
            ) from error
        rows = list(self.rows)
        for group, option in zip(self.groups, picked, strict=True):
            for i in group:
                rows[i] = dataclasses.replace(rows[i], option=self.options[option])
        return dataclasses.replace(self, rows=tuple(rows), budget=bits_per_weight, rules=())

    def curve(self) -> tuple[list[float], list[float]]:
        """(bits per weight, predicted loss) of the best choices within many budgets."""
        sizes = [
            np.sum([self.rows[i].bits for i in group], 0) / self._elements for group in self.groups
        ]
        ends = [
            sum(float(pick(size[np.isfinite(size)])) for size in sizes) for pick in (np.min, np.max)
        ]
        budgets = np.linspace(ends[0] * (1 + 1e-12), ends[1] * (1 + 1e-12), _POINTS)
        found = [self.within(budget) for budget in budgets.tolist()]
        return [x.bits_per_weight for x in found], [x.score for x in found]

    def uniform(self) -> dict[str, tuple[float, float]]:
        """(bits per weight, predicted loss) of each option for all parameters that it fits."""
        found = {}
        for c, name in enumerate(self.options):
            bits = sum(row.bits[c] for row in self.rows) / self._elements
            if math.isfinite(bits):
                found[name] = bits, sum(row.scores[c] for row in self.rows)
        return found

    def table(self) -> "rich.table.Table":
        """One row per parameter and a row of totals, as a rich table."""
        # rich is slow to import, and only tables need it.
        import rich.markup
        import rich.table

        table = rich.table.Table(title="Allocation of bits", show_footer=True)
        table.add_column("parameter", f"{len(self.rows)} parameters")
        table.add_column("shape")
        table.add_column("option", f"budget {self.budget:g}")
        table.add_column("bits per weight", f"{self.bits_per_weight:.3f}", justify="right")
        table.add_column("predicted loss", f"{self.score:.3g}", justify="right")
        table.add_column("share", justify="right")
        for row in self.rows:
            place, total = self._place(row), self.score or 1.0
            table.add_row(
                rich.markup.escape(row.path),
                "x".join(map(str, row.shape)),
                rich.markup.escape(self.options[place]),
                f"{row.bits[place] / row.elements:.3f}",
                f"{row.scores[place]:.3g}",
                f"{row.scores[place] / total:.1%}",
            )
        return table

    def plot(self, path: str) -> None:
        """Draws bits and predicted loss per parameter, and the loss against bits per weight.

        Args:
            path: of the picture, whose suffix selects the type: ".png", ".svg", ...

        Raises:
            ImportError: matplotlib is missing; it comes with the extra `plot`.
        """
        places = [self._place(row) for row in self.rows]
        pairs = list(zip(self.rows, places, strict=True))
        plot_allocation(
            [row.path for row in self.rows],
            [self.options[c] for c in places],
            [row.bits[c] / row.elements for row, c in pairs],
            [row.scores[c] for row, c in pairs],
            self.curve(),
            self.uniform(),
            (self.bits_per_weight, self.score),
            path,
        )

    @property
    def _elements(self) -> int:
        return sum(row.elements for row in self.rows)

    def _place(self, row: AllocationRow) -> int:
        assert row.option is not None, "within() chooses one"
        return self.options.index(row.option)

    def __rich__(self) -> "rich.table.Table":
        return self.table()

    def __str__(self) -> str:
        return to_text(self.table())

    def __repr__(self) -> str:
        return f"Allocation({len(self.rows)} parameters, {self.bits_per_weight:.3f} bits)"
