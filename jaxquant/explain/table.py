"""What `explain` found: rows, and a table to read."""

import dataclasses
from collections.abc import Iterator

import rich.console
import rich.markup
import rich.table

from .machines import Machine
from .speeds import Measurement


@dataclasses.dataclass(frozen=True)
class ExplanationRow:
    """One product.

    Attributes:
        path: where it lies: names of `jax.named_scope` and of jitted functions, as profiles have
            them. Empty outside of all.
        line: of the innermost function in no library, such as "model.py:12"; empty if all are.
        operation: name of the function of `jax.lax`.
        shapes: those of the left operand, the right one and the result, before `vmap`.
        formats: of both operands: a scheme such as "int4 g128", or the dtype of a float array.
        implementation: the row of the table that runs, as `implementation=` names it.
        is_forced: whether `implementation=` named it.
        refusals: (name, reason) of each earlier row of the table.
        is_integer: whether codes are multiplied as whole numbers, and not as floats.
        copies: products that `vmap` makes of it.
        times: how often loops of known length run it; None inside a `while_loop`.
        bytes: operands and result, each once, in all `times`; of one trip if these are unknown.
        operations: multiplications and additions, likewise.
        bound: "memory" or "arithmetic": which takes longer. An estimate, from the machine's rates.
        speeds: (rows, (K, N), speed in units of the float product's) as measured for the same
            computation at this size, or at the next below and above; empty if it was not.
        warning: says so where a float product was faster, or weights are sliced slowly; else None.
    """

    path: str
    line: str
    operation: str
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    formats: tuple[str, str]
    implementation: str
    is_forced: bool
    refusals: tuple[tuple[str, str], ...]
    is_integer: bool
    copies: int
    times: int | None
    bytes: int
    operations: int
    bound: str
    speeds: tuple[tuple[int, tuple[int, int], float], ...]
    warning: str | None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Rows, in the order of the program. Iterate it, print it, or take its `table()`.

    Attributes:
        machine: the machine whose rates were used.
        measurements: those of the machine that rows refer to.
        rows: one per quantized product.
    """

    machine: Machine
    measurements: tuple[Measurement, ...]
    rows: tuple[ExplanationRow, ...]

    def __iter__(self) -> Iterator[ExplanationRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def table(self) -> rich.table.Table:
        """The rows as a rich table. What a float product does faster is red."""
        title = f"Quantized products on {self.machine.name}"
        found = rich.table.Table(title=title, show_lines=True, caption=self._caption())
        for name, justify in _COLUMNS:
            found.add_column(name, justify=justify)
        for row in self.rows:
            found.add_row(*_cells(row), style="red" if row.warning else None)
        return found

    def _caption(self):
        if not self.rows:
            return "There is no quantized product in this function."
        words = [
            "Bytes and operations are counts, of operands and result once each.",
            f"What bounds is an estimate, from the rates of {self.machine.name} "
            f"({self.machine.source}).",
        ]
        words += [f"Speeds: {m.reference} = 1, from {m.how}." for m in self.measurements]
        return rich.markup.escape(" ".join(words))

    def __rich__(self) -> rich.table.Table:
        return self.table()

    def __str__(self) -> str:
        console = rich.console.Console(width=120)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


_COLUMNS: tuple[tuple[str, rich.console.JustifyMethod], ...] = (
    ("where", "left"),
    ("product", "left"),
    ("runs as, and why", "left"),
    ("MB", "right"),
    ("million\noperations", "right"),
    ("bound by", "left"),
    ("speed,\nfloat = 1", "right"),
)


def speed_range(row: ExplanationRow) -> str:
    """Lowest and highest of the speeds measured next to a product."""
    speeds = [speed for *_, speed in row.speeds]
    if not speeds:
        return "not measured"
    low, high = f"{min(speeds):.2f}", f"{max(speeds):.2f}"
    return low if low == high else f"{low} to {high}"


def _cells(row):
    texts = (
        "\n".join(filter(None, (row.path, row.line))),
        "\n".join(_product(row)),
        "\n".join(_reasons(row)),
        f"{row.bytes / 1e6:.3f}",
        f"{row.operations / 1e6:.2f}",
        row.bound,
        speed_range(row),
    )
    return [rich.markup.escape(text) for text in texts]


def _product(row):
    lhs, rhs, _ = ("x".join(map(str, shape)) or "scalar" for shape in row.shapes)
    words = [row.operation, f"{lhs} by {rhs}", " by ".join(row.formats)]
    words += [f"{row.copies} copies, by vmap"] if row.copies > 1 else []
    is_repeated = row.times is not None and row.times != 1
    words += [f"{row.times} times, in a loop"] if is_repeated else []
    return words + ["in a loop of unknown length"] * (row.times is None)


def _reasons(row):
    kind = "whole numbers" if row.is_integer else "floats"
    words = [f"{row.implementation}, on {kind}{', as asked for' if row.is_forced else ''}"]
    by_reason: dict[str, list[str]] = {}
    for name, reason in row.refusals:
        by_reason.setdefault(reason, []).append(name)
    words += [f"not {' or '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return words + ([row.warning] if row.warning else [])
