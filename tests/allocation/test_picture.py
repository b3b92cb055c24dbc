"""What pictures of allocations show."""

import pytest

from jaxquant.allocation.picture import plot_allocation


def test_the_legend_has_the_colors_of_the_bars(monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="pictures need jaxquant[plot]")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    options, bits, scores = ["4 bits", "8 bits", "4 bits"], [4.0, 8.0, 4.0], [0.2, 0.01, 0.3]
    plot_allocation("abc", options, bits, scores, ([4, 8], [1, 0.1]), {}, (5, 0.5), "a.png")
    (legend,) = drawn[0].legends
    shown = {
        text.get_text(): patch.get_facecolor()
        for text, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)
    }
    bars = [bar.get_facecolor() for bar in drawn[0].axes[0].patches]
    assert [shown[option] for option in options] == bars
    assert bars[0] == bars[2] != bars[1]
