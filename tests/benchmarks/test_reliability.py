"""The table of reliability says what the script prints."""

import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import kills, reliability

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
TABLE = PAGE[PAGE.index("| tried |") :].split("\n\n")[0]
ROWS = re.findall(r"^\| (.*) \| (\d+) \| (.*) \|$", TABLE, re.MULTILINE)


def without_counts(held):
    return re.sub(r"\(\d+\)", "", held)


def test_the_table_has_a_row_for_each_check():
    listed = {what: int(times) for what, times, _ in ROWS}
    assert listed == {what: times for what, (times, _) in reliability.CHECKS.items()}


def test_texts_of_errors_are_compared():
    with reliability._raises(OSError, "full"):
        raise OSError("the disk is full")
    with pytest.raises(OSError, match="another"), reliability._raises(OSError, "full"):
        raise OSError("another")
    missing = pytest.raises(AssertionError, match="no OSError with 'full'")
    with missing, reliability._raises(OSError, "full"):
        pass


def test_mixtures_of_two_trees_are_found():
    first, second = kills.tree_of(1), kills.tree_of(2)
    assert kills.is_whole(first)
    first["w"][2] = second["w"][2]
    assert not kills.is_whole(first)


@pytest.mark.slow
def test_every_check_holds_once():
    command = [sys.executable, "-m", "benchmarks.reliability", "--most", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"^\| (.*) \| 1 \| (.*) \|$", done.stdout, re.MULTILINE)
    assert len(printed) == sum(
        not reliability.LEFT_OUT.get(c) for _, c in reliability.CHECKS.values()
    )
    held = {what: without_counts(text) for what, _, text in ROWS}
    assert {what: without_counts(text) for what, text in printed}.items() <= held.items()
