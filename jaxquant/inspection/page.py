"""Pages about files: HTML that stands alone, for any browser, without a network."""

import math
import os
from collections.abc import Sequence
from html import escape

from ..tree.internal import replacing
from .charts import bars, columns, histograms, megabytes, name_of
from .contents import Contents
from .rows import InspectedTensor
from .style import CSS, SCRIPT

# Nothing may be loaded, whatever the names in a file contain.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
# Heading, and whether the column holds numbers.
_COLUMNS = (
    ("tensor", False),
    ("shape", True),
    ("format", False),
    ("scales", False),
    ("activations", False),
    ("bits per weight", True),
    ("bytes", True),
    ("SQNR dB", True),
    ("codes", True),
    ("note", False),
)


def write_page(path: str | os.PathLike[str], contents: Contents) -> None:
    """Writes a page about the contents of a file: totals, charts and a table that can be sorted.

    Raises:
        OSError: the page cannot be written; `path` is then as it was.
    """
    # Names in files may have lone surrogates, which UTF-8 cannot express.
    data = to_html(contents).encode("utf-8", "backslashreplace")
    with replacing(path) as file:
        file.write(data)


def to_html(contents: Contents) -> str:
    """A page about the contents of a file, as HTML."""
    title, rows = escape(contents.path.name), contents.rows()
    parts = [
        f"<h1>{name_of(contents.path.name)}</h1>",
        _totals(rows, contents.elsewhere),
        "<h2>Bytes and bits per weight</h2>",
        bars(rows),
    ]
    if any(row.codes for row in rows):
        parts += ["<h2>Codes and scales</h2>", histograms(rows)]
    parts += ["<h2>Tensors</h2>", _table(rows)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _totals(rows: Sequence[InspectedTensor], elsewhere: str) -> str:
    size, after = sum(row.size for row in rows), sum(row.nbytes for row in rows)
    quantized = sum(bool(row.granularity) for row in rows)
    figures = {
        "tensors": f"{len(rows):,}",
        "quantized": f"{quantized:,}",
        "weights": f"{size:,}",
        "bits per weight": f"{8 * after / max(size, 1):.2f}",
        "in memory": megabytes(after),
        elsewhere: megabytes(sum(row.bytes_elsewhere for row in rows)),
    }
    items = (f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items())
    return f"<dl>{''.join(items)}</dl>"


def _table(rows: Sequence[InspectedTensor]) -> str:
    heads = "".join(
        f"<th{_number(is_number)}><button>{name}</button></th>" for name, is_number in _COLUMNS
    )
    body = "\n".join(map(_row, rows))
    return (
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _number(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _row(row: InspectedTensor) -> str:
    has_sqnr = row.sqnr is not None
    used = sum(count > 0 for count in row.codes)
    number = _number(True)
    cells = [
        _cell(' class="name"', row.name, name_of(row.name)),
        _cell(number, row.size, "x".join(map(str, row.shape)) or "scalar"),
        *(_cell("", text, escape(text)) for text in (row.format, row.granularity, row.inputs)),
        _cell(number, row.bits, f"{row.bits:.2f}"),
        _cell(number, row.nbytes, f"{row.nbytes:,}"),
        _cell(number, _sortable(row.sqnr), f"{row.sqnr:.1f}" if has_sqnr else ""),
        _cell(number, used, columns(row.codes) if row.codes else ""),
        _cell(' class="note"', row.note, escape(row.note)),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _sortable(value: float | None) -> float:
    """A finite number in its place: no error is above all others, an unknown one below."""
    return -1e9 if value is None or math.isnan(value) else min(max(value, -1e8), 1e8)


def _cell(attributes: str, value: float | str, content: str) -> str:
    return f'<td{attributes} data-value="{escape(str(value))}">{content}</td>'
