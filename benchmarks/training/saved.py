"""Files of results that hold several parts of the suite, and are continued."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from .loop import Result


def parts_in(path: pathlib.Path | None) -> dict[str, Any]:
    """What a file holds already, without the description of the machine."""
    found = json.loads(path.read_text()) if path and path.exists() else {}
    return {name: value for name, value in found.items() if name != "machine"}


def rows_in(path: pathlib.Path | None, part: str) -> list[Result]:
    """The rows of a part that a file holds already."""
    return parts_in(path).get(part, [])


def save_rows(
    path: pathlib.Path | None, about: Mapping[str, Any], part: str, rows: list[Result]
) -> None:
    """Writes the rows of a part, beside the other parts that the file holds. None: no file."""
    if path is not None:
        path.write_text(json.dumps({**about, **parts_in(path), part: rows}, indent=1))
