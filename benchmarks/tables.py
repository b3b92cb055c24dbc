"""Tables of speeds: one line per contender, one column per case."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.table

# A relative error above this is not rounding: the contender computes something else.
WRONG = 0.2


def speeds(
    title: str,
    results: Sequence[dict[str, Any]],
    missing: Sequence[str] = (),
    reference: str = "XLA float32",
    wrong: float = WRONG,
) -> rich.table.Table:
    """Results as a table, including contenders that are not installed or did not run.

    Args:
        title: title of the table.
        results: rows with `contender`, `column`, and either `unsupported`, or `speed`, the
            `error` relative to the reference, and the `note` that follows the speed.
        missing: names of contenders that are not installed.
        reference: contender whose speed is 1.
        wrong: the error above which a contender computes something else.

    Returns:
        A table. Red: slower than the reference, or wrong. Bold: the fastest correct contender.
    """
    columns = list(dict.fromkeys(r["column"] for r in results))
    found = rich.table.Table("by", *columns, title=title)
    best = {c: max(_speed(r, wrong) for r in results if r["column"] == c) for c in columns}
    for name in dict.fromkeys(r["contender"] for r in results):
        cells = {r["column"]: r for r in results if r["contender"] == name}
        found.add_row(name, *(_cell(cells[c], best[c], reference, wrong) for c in columns))
    for name in missing:
        found.add_row(name, *["not installed"] * len(columns), style="dim")
    return found


def markdown(
    rows: Sequence[Mapping[str, Any]], cell: Callable[[Mapping[str, Any]], str]
) -> list[str]:
    """Lines of a table for the docs, from rows with `contender` and `column`."""
    columns = list(dict.fromkeys(r["column"] for r in rows))
    cells = {(r["contender"], r["column"]): cell(r) for r in rows}
    lines = [f"| by | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name in dict.fromkeys(r["contender"] for r in rows):
        lines.append(f"| {name} | {' | '.join(cells[name, c] for c in columns)} |")
    return lines


def unsupported(results: Sequence[dict[str, Any]]) -> list[str]:
    """Why contenders did not run, once each."""
    lines = [f"{r['contender']}: {r['unsupported']}" for r in results if "unsupported" in r]
    return list(dict.fromkeys(lines))


def _speed(result, wrong):
    """The speed of a contender that ran and is correct, else 0."""
    return result["speed"] if "unsupported" not in result and result["error"] <= wrong else 0


def _cell(result, best, reference, wrong):
    if "unsupported" in result:
        return "not supported"
    if not result["error"] <= wrong:
        return f"[red]wrong, error {100 * result['error']:.0f} %[/red]"
    text = f"{result['speed']:.2f} · {result['note']}"
    if result["speed"] < 1 and result["contender"] != reference:
        return f"[red]{text}[/red]"
    return f"[bold]{text}[/bold]" if result["speed"] == best else text
