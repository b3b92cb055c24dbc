"""Pictures of reports. The only module that needs matplotlib, which is optional."""

from collections.abc import Sequence

import numpy as np

from .report_row import ReportRow


def plot_report(rows: Sequence[ReportRow], path: str) -> None:
    """Draws the SQNR of each leaf beside the codes' histogram of each scheme."""
    done = [r for r in rows if r.scheme is not None]
    if not done:
        raise ValueError(f"No leaf of {len(rows)} is quantized; there is nothing to draw.")
    figure, left, right = _panels(len(done))
    schemes = list(dict.fromkeys(r.scheme for r in done))
    colors = {scheme: f"C{i % 10}" for i, scheme in enumerate(schemes)}
    _draw_sqnr(left, done, colors)
    _draw_codes(right, done, colors)
    figure.savefig(path, dpi=120)


def _panels(count):
    try:
        # An optional package, and a slow one to import.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"Pictures need matplotlib: pip install 'jaxquant[plot]' ({error})."
        ) from error
    figure = Figure(figsize=(12, max(3.5, 1.2 + 0.2 * count)), layout="constrained")
    return figure, *figure.subplots(1, 2, width_ratios=[3, 2])


def _draw_sqnr(axes, rows, colors):
    places = np.arange(len(rows))
    values = [r.sqnr if r.sqnr is not None and np.isfinite(r.sqnr) else 0 for r in rows]
    bars = axes.barh(places, values, color=[colors[r.scheme] for r in rows])
    # A bar of length zero can mean zero noise or a missing comparison.
    texts = ["not compared" if r.sqnr is None else f"{r.sqnr:.1f}" for r in rows]
    axes.bar_label(bars, texts, padding=2, fontsize=7)
    axes.set_yticks(places, [r.path for r in rows], fontsize=7, parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("SQNR, dB (more is better)")
    axes.set_title("Signal to quantization noise, per leaf")
    axes.grid(axis="x", alpha=0.3)


def _draw_codes(axes, rows, colors):
    for scheme, color in colors.items():
        counts = np.sum([r.codes for r in rows if r.scheme == scheme], 0)
        edges = np.linspace(-1, 1, len(counts) + 1)
        axes.stairs(counts / max(counts.sum(), 1), edges, color=color, label=scheme, linewidth=1.5)
    axes.set_xlabel("code, from the lowest to the highest of its format")
    axes.set_ylabel("share of codes")
    axes.set_title("Use of the codes")
    # Matplotlib searches many rows for the best place for seconds; most codes are in the middle.
    axes.legend(fontsize=8, loc="upper left")
