"""Tables that hold the final losses of several ways to train against those of one."""

import statistics
from collections.abc import Callable, Mapping

import rich.table

from .loop import Result, spread

# (result of the way) -> (text, whether the way loses by it)
Cell = Callable[[Result], tuple[str, bool]]


def by_seed(results: list[Result], contender: str) -> dict[int, float]:
    """Losses of one contender."""
    return {r["seed"]: r["loss"] for r in results if r["contender"] == contender}


def table(
    title: str,
    results: list[Result],
    reference: str,
    goals: Mapping[str, float],
    columns: Mapping[str, Cell],
) -> rich.table.Table:
    """One line per contender: its loss, in percent above the reference's, and more.

    Args:
        title: above the table.
        results: with `contender`, `seed`, `loss`, and what the columns read.
        reference: contender that others are held against, seed by seed.
        goals: share of the loss by which a contender may be above the reference.
        columns: what else is shown.

    Returns:
        The table, in which is red what is lost.
    """
    names = "by", "validation loss", "above it, %", "worst seed, %"
    found = rich.table.Table(title=title)
    for name in (*names, *columns):
        found.add_column(name, no_wrap=True)
    exact = by_seed(results, reference)
    for contender in dict.fromkeys(r["contender"] for r in results):
        losses = by_seed(results, contender)
        above = [100 * (losses[s] / exact[s] - 1) for s in losses]
        is_lost = statistics.fmean(above) > 100 * goals.get(contender, float("inf"))
        cells = [f"{statistics.fmean(above):+.2f}", f"{max(above):+.2f}"]
        cells = ["", ""] if contender == reference else [_red(c, is_lost) for c in cells]
        last = [r for r in results if r["contender"] == contender][-1]
        more = [_red(*cell(last)) for cell in columns.values()]
        found.add_row(contender, spread(list(losses.values())), *cells, *more)
    return found


def _red(text, is_lost):
    return f"[red]{text}[/red]" if is_lost else text
