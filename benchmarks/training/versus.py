"""Tables that compare the final losses of several training methods with a reference."""

import statistics
from collections.abc import Callable, Mapping

import rich.table

from .loop import Result, spread

# result of a method -> (text, whether it misses a goal)
Cell = Callable[[Result], tuple[str, bool]]


def by_seed(results: list[Result], contender: str) -> dict[int, float]:
    """Losses of one contender, by seed."""
    return {r["seed"]: r["loss"] for r in results if r["contender"] == contender}


def table(
    title: str,
    results: list[Result],
    reference: str,
    goals: Mapping[str, float],
    columns: Mapping[str, Cell],
) -> rich.table.Table:
    """One row per contender: its loss, the increase over the reference in percent, and more.

    Args:
        title: above the table.
        results: with `contender`, `seed`, `loss`, and what the columns read.
        reference: contender that the others are compared with, seed by seed.
        goals: largest accepted increase of a contender's loss, as a share.
        columns: further columns.

    Returns:
        The table; missed goals are red.
    """
    names = "method", "validation loss", "increase, %", "worst seed, %"
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
