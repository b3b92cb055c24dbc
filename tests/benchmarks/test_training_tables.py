"""Tables of the results of training."""

import pathlib

import pytest

from benchmarks.training import tables

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGES = {
    "smollm2": "training.md",
    "distillation": "howto/distillation.md",
    "updates": "training.md",
}


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_table_of_the_docs_is_that_of_the_results(name):
    found = tables.TABLES[name](tables.read(name))
    assert "\n".join(found) in (DOCS / PAGES[name]).read_text()


def test_losses_are_compared_seed_by_seed():
    rows = [
        {"contender": name, "seed": seed, "loss": loss, "bytes": 3e6, "cpu_seconds_per_step": 2.0}
        for name, seed, loss in (
            ("float32", 0, 2.0), ("float32", 1, 4.0), ("8-bit", 0, 2.1), ("8-bit", 1, 4.0)
        )
    ]  # fmt: skip
    assert tables.smollm2_table(rows)[2:] == [
        "| float32 | 3.0000 |  | 3 | 2.0 | 2 |",
        "| 8-bit | 3.0500 | +2.50 % | 3 | 2.0 | 2 |",
    ]


def test_the_share_of_rounding_that_is_recovered():
    rows = [
        {"scheme": s, "contender": name, "divergence": kl, "cpu_seconds_per_step": 2.0, "steps": n}
        for s, name, kl, n in (
            ("A", "nearest", 2.0, 0), ("A", "QEP", 1.0, 0), ("B", "nearest", 4.0, 0),
            ("A", "QEP, QAT", 0.5, 7),
        )
    ]  # fmt: skip
    assert tables.distillation_table(rows)[2:] == [
        "| A | nearest | 2.000 |  |  |  |",
        "| A | QEP | 1.000 | 50 % |  |  |",
        "| B | nearest | 4.000 |  |  |  |",
        "| A | QEP, QAT | 0.500 | 75 % | 7 | 2.0 |",
    ]


def test_times_are_divided_by_those_of_float32():
    rows = [
        {"shapes": s, "contender": c, "donates": donates, "nanoseconds": ns, "bytes": size}
        for s, c, donates, ns, size in (
            ("A", "float32", True, 2, 8), ("A", "8-bit", True, 5, 2.0625),
            ("A", "float32", False, 5, 8), ("A", "8-bit", False, 6, 2.0625),
            ("B", "float32", True, 4, 8), ("B", "8-bit", True, 4, 2.0625),
            ("B", "float32", False, 8, 8), ("B", "8-bit", False, 8, 2.0625),
        )
    ]  # fmt: skip
    assert tables.updates_table(rows) == [
        "| AdamW | bytes | A | B |",
        "|---|---|---|---|",
        "| float32 | 8.00 | 2.0 (1.0) | 4.0 (1.0) |",
        "| 8-bit | 2.06 | 5.0 (2.5) | 4.0 (1.0) |",
        "| float32, not donated | 8.00 | 5.0 (1.0) | 8.0 (1.0) |",
        "| 8-bit, not donated | 2.06 | 6.0 (1.2) | 8.0 (1.0) |",
    ]
