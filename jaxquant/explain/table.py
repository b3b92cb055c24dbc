"""The result of `explain`: rows, and a table of them."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .machines import Machine
from .speeds import Measurement

if TYPE_CHECKING:
    import rich.console
    import rich.table


@dataclasses.dataclass(frozen=True)
class ExplanationRow:
    """One matrix multiplication or convolution with a quantized operand.

    Attributes:
        path: names of `jax.named_scope` and of jitted functions around it, as in profiles; empty
            outside of all.
        parameter: path of the quantized parameter, in functions from `jaxquant.lift`; else empty.
        line: file and line of the innermost call that is not in a library, such as "model.py:12";
            empty if all are.
        operation: name of the function of `jax.lax`.
        shapes: of the left operand, the right operand and the result, before `vmap`.
        formats: of both operands: a scheme such as "int4 g128", or the dtype of a float array.
        implementation: the computation that runs, as `implementation=` names it.
        is_forced: whether `implementation=` named it.
        not_selected: (name, reason) of each computation that is tried before it on this platform.
        is_integer: whether it multiplies codes as integers, not as floating-point values.
        copies: how many copies `vmap` makes of it.
        times: how often loops of known length run it; None inside a `while_loop`.
        bytes: of the operands and the result, each counted once, in all `times`; of one iteration
            if `times` is None.
        operations: multiplications and additions, counted likewise.
        bound: "memory" or "arithmetic", whichever takes longer: an estimate from the machine's
            rates.
        speeds: (rows, (K, N), speed relative to the float product) as measured for the same
            computation at this size, or at the nearest sizes below and above; empty if unmeasured.
        estimate: speed relative to the float product by a model of the machine, where `speeds` is
            empty and there is a model: on CPU, for rows by one matrix; else None.
        warning: says if the float product is faster, or if slicing the weights is slow; else None.

    Example:
        >>> q = jq.quantize(jnp.ones((64, 8)), jq.ArrayConfig(), axis=0)
        >>> (row,) = jq.explain(jq.matmul, jnp.ones((2, 64)), q)
        >>> row.shapes, row.formats
        (((2, 64), (64, 8), (2, 8)), ('float32', 'int8 per channel'))
    """

    path: str
    parameter: str
    line: str
    operation: str
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    formats: tuple[str, str]
    implementation: str
    is_forced: bool
    not_selected: tuple[tuple[str, str], ...]
    is_integer: bool
    copies: int
    times: int | None
    bytes: int
    operations: int
    bound: str
    speeds: tuple[tuple[int, tuple[int, int], float], ...]
    estimate: float | None
    warning: str | None


@dataclasses.dataclass(frozen=True)
class DequantizedRow:
    """A place where a function from `jaxquant.lift` dequantizes a parameter.

    Attributes:
        parameter: path of the parameter.
        line: file and line of the innermost call that is not in a library; empty if all are.
        primitive: the operation of JAX that needs a float array.
        why: the reason.
        times: how often loops of known length run it; None inside a `while_loop`.
        bytes: of codes, scales and zero points, in all `times`; of one iteration if that is None.

    Example:
        >>> q = jq.quantize(jnp.ones((64, 8)), jq.ArrayConfig(), axis=0)
        >>> (row,) = jq.explain(jq.lift(jnp.tanh), q).dequantized
        >>> row.primitive, row.why
        ('tanh', 'it has no form for quantized arrays')
    """

    parameter: str
    line: str
    primitive: str
    why: str
    times: int | None
    bytes: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Rows in the order of the program. Iterate over it, print it, or use its `table()`.

    Attributes:
        machine: the machine whose rates were used.
        measurements: those of the machine that rows refer to.
        rows: one per quantized matrix multiplication or convolution.
        dequantized: one per place where a function from `jaxquant.lift` dequantizes a parameter.

    Example:
        >>> q = jq.quantize(jnp.ones((64, 8)), jq.ArrayConfig(), axis=0)
        >>> found = jq.explain(lambda x: jq.matmul(x, q), jnp.ones((2, 64)), platform="tpu")
        >>> found.machine.name, len(found), [row.implementation for row in found]
        ('v5e', 1, ['scaled'])
    """

    machine: Machine
    measurements: tuple[Measurement, ...]
    rows: tuple[ExplanationRow, ...]
    dequantized: tuple[DequantizedRow, ...] = ()

    def __iter__(self) -> Iterator[ExplanationRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def table(self) -> "rich.table.Table":
        """The rows as a rich table; those with a warning and what is dequantized are red."""
        # rich is slow to import, and only tables need it.
        import rich.markup
        import rich.table

        title = f"Quantized products on {self.machine.name}"
        caption = rich.markup.escape(self._caption())
        found = rich.table.Table(title=title, show_lines=True, caption=caption)
        for name, justify in _COLUMNS:
            found.add_column(name, justify=justify)
        for row in self.rows:
            texts = map(rich.markup.escape, _texts(row))
            found.add_row(*texts, style="red" if row.warning else None)
        for row in self.dequantized:
            found.add_row(*map(rich.markup.escape, _dequantized_texts(row)), style="red")
        return found

    def _caption(self):
        if not self.rows and not self.dequantized:
            return "This function does not contain quantized products."
        words = [
            "Bytes and operations are counts: operands and result once each.",
            f"What bounds a product is an estimate from the rates of {self.machine.name} "
            f"({self.machine.source}).",
        ]
        words += [f"Speeds: {m.reference} = 1, from {m.how}." for m in self.measurements]
        if any(row.estimate is not None for row in self.rows):
            words += ["Speeds with about: estimates from these rates, not measured."]
        return " ".join(words)

    def __rich__(self) -> "rich.table.Table":
        return self.table()

    def __str__(self) -> str:
        import rich.console

        console = rich.console.Console(width=120, force_jupyter=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


_COLUMNS: tuple[tuple[str, "rich.console.JustifyMethod"], ...] = (
    ("where", "left"),
    ("product", "left"),
    ("runs as, and why", "left"),
    ("MB", "right"),
    ("million\noperations", "right"),
    ("bound by", "left"),
    ("speed,\nfloat = 1", "right"),
)


def speed_range(row: ExplanationRow) -> str:
    """Lowest and highest speed measured at the nearest sizes, or the estimate."""
    speeds = [speed for *_, speed in row.speeds]
    if not speeds:
        return "not measured" if row.estimate is None else f"about {row.estimate:.2f}"
    low, high = f"{min(speeds):.2f}", f"{max(speeds):.2f}"
    return low if low == high else f"{low} to {high}"


def _texts(row):
    return (
        "\n".join(filter(None, (row.parameter, row.path, row.line))),
        "\n".join(_product(row)),
        "\n".join(_reasons(row)),
        f"{row.bytes / 1e6:.3f}",
        f"{row.operations / 1e6:.2f}",
        row.bound,
        speed_range(row),
    )


def _dequantized_texts(row):
    where = "\n".join(filter(None, (row.parameter, row.line)))
    words = "\n".join(("dequantized", *_repeated(row.times)))
    return where, words, f"{row.primitive}: {row.why}", f"{row.bytes / 1e6:.3f}", "", "", ""


def _product(row):
    lhs, rhs, _ = ("x".join(map(str, shape)) or "scalar" for shape in row.shapes)
    words = [row.operation, f"{lhs} by {rhs}", " by ".join(row.formats)]
    words += [f"{row.copies} copies by vmap"] if row.copies > 1 else []
    return words + _repeated(row.times)


def _repeated(times):
    if times is None:
        return ["in a loop of unknown length"]
    return [f"{times} times in a loop"] if times != 1 else []


def _reasons(row):
    kind = "in integers" if row.is_integer else "in floating point"
    words = [f"{row.implementation}, {kind}{', as requested' if row.is_forced else ''}"]
    by_reason: dict[str, list[str]] = {}
    for name, reason in row.not_selected:
        by_reason.setdefault(reason, []).append(name)
    words += [f"not {' or '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return words + ([row.warning] if row.warning else [])
