import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import W4A16, W8A8, Rule, quantize, tree

from .trees import normal, parameters

image = pytest.importorskip("matplotlib.image", reason="pictures need jaxquant[plot]")


@pytest.mark.slow
def test_plot_writes_a_picture_that_is_not_blank(tmp_path):
    params = parameters()
    rules = [Rule("*kernel", W4A16, group_size=32), *tree.default_rules(W8A8)]
    tree.report(params, tree.quantize(params, rules)).plot(str(tmp_path / "report.png"))

    pixels = image.imread(tmp_path / "report.png")

    height, width, channels = pixels.shape
    assert (width, channels) == (1440, 4)
    assert height >= 420
    is_ink = (pixels[..., :3] < 0.5).any(-1)
    # Each third of the width is drawn on, but not filled.
    assert all(0.005 < part.mean() < 0.8 for part in np.array_split(is_ink, 3, axis=1))
    # The two schemes have different colours, so the picture is not grey.
    hues = pixels[..., 0] - pixels[..., 2]
    assert (hues > 0.5).any()
    assert (hues < -0.5).any()


@pytest.mark.slow
def test_the_picture_names_leaves_and_schemes_and_the_noise(tmp_path):
    params = {"a$b": jnp.asarray(normal(64, 32)), "x$^{$": jnp.asarray(normal(64, 32, seed=1))}
    params |= {"lossless": jnp.full((8, 4), 127.0), "left": jnp.ones(3)}
    report = tree.report(params, tree.quantize(params, [Rule("left", None), Rule("*", W8A8)]))
    report.plot(str(tmp_path / "report.svg"))
    texts = re.findall("<!-- (.*?) -->", (tmp_path / "report.svg").read_text())
    assert {"a$b", "x$^{$", "lossless", "inf", "int8 per channel, int8 inputs"} <= set(texts)
    assert "left" not in texts
    assert {f"{row.sqnr:.1f}" for row in report.rows if row.scheme} <= set(texts)


def test_the_picture_says_which_leaves_were_not_compared(tmp_path, monkeypatch):
    # Matplotlib warns if its search for the best place of a legend takes a second.
    monkeypatch.delattr("matplotlib.legend.Legend._find_best_position")
    quantized = {"w": quantize(normal(64, 32), W8A8.weights)}
    tree.report(None, quantized).plot(str(tmp_path / "report.svg"))
    assert "<!-- not compared -->" in (tmp_path / "report.svg").read_text()


@pytest.mark.slow
def test_the_picture_grows_with_the_leaves(tmp_path):
    q = quantize(normal(64, 32), W8A8.weights)
    for count in (2, 40):
        tree.report(None, {f"w{i}": q for i in range(count)}).plot(str(tmp_path / f"{count}.png"))
    assert image.imread(tmp_path / "40.png").shape[0] > image.imread(tmp_path / "2.png").shape[0]


def test_an_empty_report_cannot_be_plotted(tmp_path):
    report = tree.report(None, {"a": jnp.ones(3), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match="No leaf of 2 is quantized; there is nothing to draw"):
        report.plot(str(tmp_path / "report.png"))
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = tree.report(None, {"w": quantize(normal(64, 32), W8A8.weights)})
    with pytest.raises(ImportError, match=r"Pictures need matplotlib: pip install 'jaxquant\[plot"):
        report.plot(str(tmp_path / "report.png"))
