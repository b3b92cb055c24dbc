import math

import pytest
import rich.console

from benchmarks import quantize, tables


def line(name, speed=1.0, error=0.0, column="M=1", **more):
    return {"contender": name, "column": column, "speed": speed, "error": error, "note": "", **more}


def printed(table):
    """The markup of each line's cells, by its first cell."""
    columns = [list(c.cells) for c in table.columns]
    return {cells[0]: list(cells[1:]) for cells in zip(*columns, strict=True)}


def test_slower_or_wrong_contenders_are_red_and_the_fastest_correct_one_is_bold():
    results = [line("XLA float32"), line("slow", 0.5), line("fast", 3), line("fastest", 4)]
    results += [line("wrong", 9, 0.5), line("NaN", 9, math.nan)]
    found = printed(tables.speeds("title", results))
    assert found["slow"][0].startswith("[red]0.50")
    assert found["fast"][0].startswith("3.00")
    assert found["fastest"][0].startswith("[bold]4.00")
    assert found["wrong"] == ["[red]wrong, error 50 %[/red]"]
    assert found["NaN"][0].startswith("[red]wrong")
    assert found["XLA float32"][0].startswith("1.00")
    assert printed(tables.speeds("title", results, wrong=0.8))["wrong"][0].startswith("[bold]9.00")


def test_missing_and_unsupported_contenders_have_a_line_with_the_reason():
    results = [
        line("XLA float32"),
        {"contender": "a", "column": "M=1", "unsupported": "odd length"},
    ]
    table = tables.speeds("title", results, ["other"])
    found = printed(table)
    assert found["a"] == ["not supported"]
    assert found["other"] == ["not installed"]
    assert tables.unsupported(results * 2) == ["a: odd length"]
    rich.console.Console(quiet=True).print(table)


@pytest.mark.parametrize("key", ["in_copies", "peak"])
def test_quantizing_is_red_if_another_library_is_better(key):
    figures = ("first_seconds", "in_sums", "bits_per_weight", "seconds", "in_copies", "peak")
    ours = {"name": "ours", "family": "int8", "is_ours": True, **dict.fromkeys(figures, 2.0)}
    other = ours | {"name": "other", "is_ours": False, key: 1.0}
    apart = other | {"name": "apart", "family": "nf4"}
    table = quantize.table("title", [ours, other, apart], ["Qwix"])
    rows = list(zip(*(c.cells for c in table.columns), strict=True))
    reds = [[cell for cell in row if "red" in cell] for row in rows]
    assert reds == [["[red]2.00[/red]"], [], [], []]
    assert "not installed" in rows[3]
    alone = quantize.table("title", [ours, apart], [])
    assert not any("red" in str(cell) for c in alone.columns for cell in c.cells)
