"""Brings the tables of docs/reference.md up to date: `python -m tests.reference`.

A row says what the first line of the docstring says, and links to the file that has it. Constants
have no docstring: what their rows say is written by hand.
"""

import inspect
import os
import pathlib
import re
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jaxquant
import jaxquant.keras

ROOT = pathlib.Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference.md"
ROW = re.compile(r"^\| `([\w.]+)` \| (.*) \| \[(.*)\]\((.*)\) \|$", re.MULTILINE)


def documented(name):
    """The object of that public name, if it has a docstring of its own; else None."""
    value: Any = jaxquant
    for part in name.split("."):
        value = getattr(value, part)
    value = value if inspect.isclass(value) or inspect.ismodule(value) else inspect.unwrap(value)
    is_documented = any(
        check(value) for check in (inspect.isclass, inspect.isfunction, inspect.ismodule)
    )
    return value if is_documented else None


def up_to_date(row):
    """A row of a table, a match of `ROW`, as it should be."""
    name, _, path, _ = row.groups()
    value = documented(name)
    if value is None:
        return row[0]
    # An escaped bar is no column of the table.
    what = (inspect.getdoc(value) or "").partition("\n")[0].replace("|", r"\|")
    source = inspect.getsourcefile(value)
    assert source is not None, name
    path = str(pathlib.Path(source).relative_to(ROOT / "jaxquant"))
    # Two underscores would begin bold text.
    shown = path.replace("__", r"\_\_")
    return f"| `{name}` | {what} | [{shown}](../jaxquant/{path}) |"


def up_to_date_text():
    """The page as it should be."""
    return ROW.sub(up_to_date, REFERENCE.read_text())


if __name__ == "__main__":
    REFERENCE.write_text(up_to_date_text())
