"""Charts of pages, as inline SVG that is stretched to the width at hand; texts are HTML."""

from collections.abc import Mapping, Sequence
from html import escape

from .rows import InspectedTensor

# More bars than this are hard to read.
MAX_BARS = 24


def megabytes(count: float) -> str:
    """A number of bytes in MB, or in kB if it is small."""
    return f"{count / 1e6:,.2f} MB" if count >= 1e5 else f"{count / 1e3:,.2f} kB"


def name_of(text: str) -> str:
    """A name as HTML. Marks that change the direction of text end with it."""
    return f"<bdi>{escape(text)}</bdi>"


def bars(rows: Sequence[InspectedTensor]) -> str:
    """Bytes, and bits per weight, of the largest tensors."""
    shown = sorted(rows, key=lambda row: -row.nbytes)[:MAX_BARS]
    if not shown:
        return ""
    longest = max(row.nbytes for row in shown) or 1
    # Bars of 64-bit integers would leave those of 4-bit codes without a length.
    most = max(min(row.bits, 32) for row in shown) or 1
    lines = [
        f'<div class="bar"><span class="name">{name_of(row.name)}</span>'
        f"{_bar(row.nbytes / longest, 'bytes')}<span>{megabytes(row.nbytes)}</span>"
        f"{_bar(min(row.bits / most, 1), 'bits')}<span>{row.bits:.2f} bits</span></div>"
        for row in shown
    ]
    rest = len(rows) - len(shown)
    more = f"<p>The {rest} smaller tensors are only in the table.</p>" if rest else ""
    return f'<div class="bars">{"".join(lines)}</div>{more}'


def _bar(share: float, kind: str) -> str:
    return (
        '<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="{kind}" width="{max(100 * share, 0.5):.2f}" height="10"/></svg>'
    )


def histograms(rows: Sequence[InspectedTensor]) -> str:
    """Codes and scales of all tensors of each format and granularity."""
    kinds: dict[str, list[InspectedTensor]] = {}
    for row in rows:
        if row.codes:
            kinds.setdefault(f"{row.format} {row.granularity}".strip(), []).append(row)
    figures = [_figures(kind, members) for kind, members in kinds.items()]
    return f'<div class="figures">{"".join(figures)}</div>'


def _figures(kind: str, rows: Sequence[InspectedTensor]) -> str:
    codes = [sum(bins) for bins in zip(*(row.codes for row in rows), strict=True)]
    exponents: dict[int, int] = {}
    for row in rows:
        _add(exponents, row.scales)
    text = f"{escape(kind)}: codes, from the lowest to the highest"
    figures = _histogram(codes, text)
    if exponents:
        low, high = min(exponents), max(exponents)
        counts = [exponents.get(e, 0) for e in range(low, high + 1)]
        text = f"{escape(kind)}: scales, from 2<sup>{low}</sup> to 2<sup>{high + 1}</sup>"
        figures += _histogram(counts, text)
    return figures


def _add(total: dict[int, int], counts: Mapping[int, int]) -> None:
    for key, count in counts.items():
        total[key] = total.get(key, 0) + count


def _histogram(counts: Sequence[int], caption: str) -> str:
    return f"<figure>{columns(counts)}<figcaption>{caption}</figcaption></figure>"


def columns(counts: Sequence[int]) -> str:
    """Counts as columns, the highest as high as the picture; pointed at, they show their share."""
    total, highest = max(sum(counts), 1), max(*counts, 1)
    heights = [40 * count / highest for count in counts]
    rects = "".join(
        f'<rect x="{10 * i + 0.5}" y="{40 - h:.2f}" width="9" height="{h:.2f}">'
        f"<title>{count / total:.2%}</title></rect>"
        for i, (count, h) in enumerate(zip(counts, heights, strict=True))
    )
    return (
        f'<svg class="columns" viewBox="0 0 {10 * len(counts)} 40" preserveAspectRatio="none" '
        f'role="img">{rects}</svg>'
    )
