"""Reports as tables. The only module of this folder that needs rich to print."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .report_row import ReportRow

if TYPE_CHECKING:
    import rich.console
    import rich.table

# Heading and alignment.
_COLUMNS: tuple[tuple[str, "rich.console.JustifyMethod"], ...] = (
    ("leaf", "left"),
    ("shape", "right"),
    ("scheme, or why not", "left"),
    ("bits per weight", "right"),
    ("MB before", "right"),
    ("MB after", "right"),
    ("SQNR dB", "right"),
)


def report_table(rows: Sequence[ReportRow], total: ReportRow) -> "rich.table.Table":
    """Rows and their total as a rich table."""
    # rich is slow to import, and only tables need it.
    import rich.markup
    import rich.table

    table = rich.table.Table(title="Quantization by leaf", show_footer=True)
    footers = ["total", "", total.scheme or "", *_figures(total)]
    for (name, justify), footer in zip(_COLUMNS, footers, strict=True):
        table.add_column(name, footer, justify=justify)
    for row in rows:
        shape = "x".join(map(str, row.shape)) or "scalar"
        what = row.scheme or row.reason or ""
        what += f"\nwarning: {row.warning}" if row.warning else ""
        path, what = (rich.markup.escape(s) for s in (row.path, what))
        style = "yellow" if row.warning else None if row.scheme else "dim"
        table.add_row(path, shape, what, *_figures(row), style=style)
    return table


def to_text(table: "rich.table.Table", width: int = 120) -> str:
    """A rich table as text."""
    import rich.console

    # In Jupyter, a console would display the table, and capture nothing.
    console = rich.console.Console(width=width, force_jupyter=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _figures(row):
    megabytes = [f"{b / 1e6:.3f}" for b in (row.bytes_before, row.bytes_after)]
    sqnr = "" if row.sqnr is None else f"{row.sqnr:.1f}"
    return f"{row.bits_per_weight:.2f}", *megabytes, sqnr
