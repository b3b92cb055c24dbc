"""Speed targets on an H200, and the outcome of a run of the gpu suite."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import rich.table


@dataclasses.dataclass(frozen=True)
class Goal:
    """A figure that a contender should reach.

    Attributes:
        scheme: the contender, chosen by itself or forced in any way.
        shape: name of the weights; None for all.
        rows: the least and the most rows of inputs that it is for.
        figure: key of a line of results.
        least: what the figure must be at least.
    """

    scheme: str
    shape: str | None
    rows: tuple[int, int]
    figure: str
    least: float


FIGURES = {
    "speed": "speed, bfloat16 = 1",
    "share_of_bandwidth": "share of the bandwidth",
}
# On an H200, with bfloat16 activations.
GOALS = (
    Goal("W4A16", "up", (1, 16), "speed", 2.5),
    Goal("W4A16", "up", (1, 16), "share_of_bandwidth", 0.7),
    Goal("W8A8", None, (4096, 4096), "speed", 1.4),
    Goal("FP8", None, (4096, 4096), "speed", 1.5),
)


def outcomes(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each goal, contender and case, and one for each goal that no line is for.

    Then come our default computations that are slower than bfloat16, for which `jaxquant.explain`
    must warn.

    Args:
        results: lines of the suite; ours have `warning`, the text of `explain`.

    Returns:
        Lines with `goal`, `contender`, `case`, `figure`, `least`, `found` and `is_met`. `found` is
        None for unsupported cases and for those that were not run.
    """
    found = []
    for goal in GOALS:
        lines = [line for line in results if _is_for(goal, line)]
        found += [_outcome(goal, line) for line in lines] or [_outcome(goal, None)]
    slow = [line for line in results if _is_slow(line)]
    return found + [_silence(line) for line in slow]


def _is_for(goal, line):
    name = line["contender"].partition(",")[0]
    is_shape = goal.shape in (None, line["shape"])
    return line["is_ours"] and name == goal.scheme and is_shape and _has_rows(goal, line["rows"])


def _has_rows(goal, rows):
    return goal.rows[0] <= rows <= goal.rows[1]


def _is_slow(line):
    is_chosen = line["is_ours"] and "," not in line["contender"]
    return is_chosen and line.get("speed", math.inf) < 1


def _outcome(goal, line):
    wanted = {"goal": goal.scheme, "figure": goal.figure, "least": goal.least}
    if line is None:
        rows = " to ".join(str(r) for r in dict.fromkeys(goal.rows))
        case = f"{goal.shape or 'all'}, M={rows}"
        return wanted | {"contender": goal.scheme, "case": case, "found": None, "is_met": False}
    value = line.get(goal.figure)
    is_met = value is not None and value >= goal.least
    about = {"contender": line["contender"], "case": _case(line), "found": value}
    return wanted | about | {"is_met": is_met}


def _silence(line):
    """Whether `explain` warns about a slow multiplication."""
    return {
        "goal": "slow, and explained",
        "figure": "speed",
        "least": 1,
        "contender": line["contender"],
        "case": _case(line),
        "found": line["speed"],
        "is_met": line["warning"] is not None,
    }


def _case(line):
    return f"{line['shape']}, M={line['rows']}"


def table(goals: Sequence[dict[str, Any]]) -> rich.table.Table:
    """Outcomes as a table. Missed targets are red."""
    found = rich.table.Table(
        "goal", "by", "of", "at least", "found", "", title="Targets on an H200"
    )
    for line in goals:
        value = "not run" if line["found"] is None else f"{line['found']:.2f}"
        verdict = "met" if line["is_met"] else "" if line["found"] is None else "[red]missed[/red]"
        wanted = f"{line['least']:.1f} {FIGURES[line['figure']]}"
        found.add_row(line["goal"], line["contender"], line["case"], wanted, value, verdict)
    return found
