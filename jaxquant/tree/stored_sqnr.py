"""SQNRs in the metadata of a file: without the float weights they cannot be computed later."""

import json
import os
from collections.abc import Mapping

from .report import Report

_KEY = "jaxquant.sqnr"


def sqnr_metadata(report: Report) -> dict[str, str]:
    """The SQNRs of a report, as metadata for `save`."""
    sqnr = {r["path"]: r["sqnr"] for r in report.to_json()["rows"] if r["sqnr"] is not None}
    return {_KEY: json.dumps(sqnr)}


def stored_sqnr(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, float]:
    """SQNRs by the paths of leaves, from the metadata of a file.

    Raises:
        ValueError: they are malformed.
    """
    text = metadata.get(_KEY, "{}")
    try:
        return {name: float(value) for name, value in json.loads(text).items()}
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its metadata {_KEY!r} is malformed: {text[:80]!r}") from error
