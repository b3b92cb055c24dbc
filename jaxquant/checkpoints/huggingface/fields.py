"""JSON files of a model, read with checks that name the file and the field."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...tree.internal import MALFORMED, MAX_HEADER_BYTES, check_regular, summary

# The largest size of a block or group, or of an axis that is written in JSON.
MAX_SIZE = 2**31
_MISSING = object()


@dataclasses.dataclass(frozen=True)
class Fields:
    """An object of a JSON file.

    Attributes:
        path: of the file.
        values: of the object.
        where: names that lead to it from the top of the file, with dots.
    """

    path: Path
    values: Mapping[str, Any]
    where: str = ""

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def over(self, others: "Fields") -> "Fields":
        """These fields, and of those that are absent or null the others."""
        own = {key: value for key, value in self.values.items() if value is not None}
        return dataclasses.replace(self, values={**others.values, **own})

    def invalid(self, key: str, wanted: str) -> ValueError:
        """An error that says what a field should have been."""
        got = repr(self.values.get(key))
        got = got if len(got) < 200 else f"{got[:200]}..."
        field = f"{self.where}.{key}" if self.where else key
        return ValueError(f"{self.path}: {field} must be {wanted}; got {got}.")

    def section(self, key: str) -> "Fields":
        """The object of a field; an empty one if it is absent or null."""
        value = self.values.get(key)
        if not isinstance(value, dict | None):
            raise self.invalid(key, "an object")
        return Fields(self.path, value or {}, f"{self.where}.{key}" if self.where else key)

    def integer(self, key: str, low: int, high: int, default: Any = _MISSING) -> Any:
        """An integer from low to high; the default if it is absent or null."""
        value = self.values.get(key)
        if value is None and default is not _MISSING:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.invalid(key, f"an integer from {low} to {high}")
        return value

    def group_size(self, key: str = "group_size", default: Any = _MISSING) -> Any:
        """A positive integer, or -1 for all elements; the default if it is absent or null."""
        size = self.integer(key, -1, MAX_SIZE, default)
        if size == 0:
            raise self.invalid(key, "a positive integer, or -1 for all elements")
        return size

    def pair(self, key: str, default: Any = _MISSING) -> Any:
        """Two positive integers, as a tuple; the default if they are absent or null."""
        value: Any = self.values.get(key)
        if value is None and default is not _MISSING:
            return default
        pair = tuple(value) if isinstance(value, list) else ()
        if len(pair) != 2 or not all(type(n) is int and 0 < n <= MAX_SIZE for n in pair):
            raise self.invalid(key, f"two integers from 1 to {MAX_SIZE}")
        return pair

    def flag(self, key: str, default: Any = _MISSING) -> Any:
        """A truth value; the default if it is absent or null."""
        value = self.values.get(key)
        if value is None and default is not _MISSING:
            return default
        if not isinstance(value, bool):
            raise self.invalid(key, "true or false")
        return value

    def one_of(self, key: str, choices: Iterable[str], default: Any = _MISSING) -> Any:
        """One of some strings; the default if it is absent or null."""
        value = self.values.get(key)
        if value is None and default is not _MISSING:
            return default
        names = list(choices)
        if not isinstance(value, str) or value not in names:
            raise self.invalid(key, f"one of {', '.join(names)}")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty if it is absent or null."""
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(s, str) for s in value):
            raise self.invalid(key, "a list of strings")
        return tuple(value)

    def text(self, key: str, default: str = "") -> str:
        """A string; the default if it is absent or null."""
        value = self.values.get(key)
        if not isinstance(value, str | None):
            raise self.invalid(key, "a string")
        return default if value is None else value


def read_json(path: Path) -> Fields:
    """The object of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a device, too long, not JSON, or not an object.
    """
    check_regular(path)
    with open(path, "rb") as file:
        text = file.read(MAX_HEADER_BYTES + 1)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{path} is too long: more than {MAX_HEADER_BYTES} bytes.")
    try:
        values = json.loads(text)
    except MALFORMED as error:
        raise ValueError(f"{path} is not JSON, {summary(error)}. Copy it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object; got a {type(values).__name__}.")
    return Fields(path, values)
