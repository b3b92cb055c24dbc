"""The pictures of docs/concepts.md are what the script draws, and what the library computes."""

import pathlib
import re
import xml.etree.ElementTree

import numpy as np
import pytest

import jaxquant as jq
from benchmarks import concepts

DOCS = pathlib.Path(__file__).parents[2] / "docs"
TEXT = re.compile(r">[^<]+</text>")
NUMBER = re.compile(r"-?\d+\.?\d*")


@pytest.mark.parametrize("name", concepts.PICTURES)
def test_the_picture_is_the_one_that_is_drawn(name):
    drawn = concepts.PICTURES[name]()
    stored = (DOCS / f"concepts-{name}.svg").read_text()
    assert NUMBER.sub("", drawn) == NUMBER.sub("", stored)
    # The last digit may differ on other machines: of coordinates and of what the texts say.
    for parts, last in ((str, 0.1), (lambda text: "".join(TEXT.findall(text)), 0.01)):
        found, wanted = (np.array(NUMBER.findall(parts(t)), float) for t in (drawn, stored))
        np.testing.assert_allclose(found, wanted, atol=1.1 * last)
    xml.etree.ElementTree.fromstring(drawn)
    assert f"](concepts-{name}.svg)" in (DOCS / "concepts.md").read_text()


def test_elements_of_one_color_share_a_scale():
    drawn = concepts.granularities()
    panels = re.split(r"font-weight", drawn)[1:]
    counts = [len(set(re.findall(r'rx="3" fill="(#\w+)"', panel))) for panel in panels]
    assert counts == [1, 6, 8, 8]


@pytest.mark.parametrize(
    "format, values",
    [
        (jq.INT2, [-1, -0.5, 0, 0.5]),
        (jq.MXFP4, [s * v / 6 for s in (-1, 1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]),
    ],
    ids=str,
)
def test_values_are_those_of_the_format(format, values):
    np.testing.assert_allclose(concepts.values_of(format), sorted({v + 0.0 for v in values}))


def test_errors_are_those_of_rounding_and_clipping():
    x = concepts.weights()
    for _, config in concepts.RANGES:
        error, rounding, clipping = concepts.error_of(x, config)
        np.testing.assert_allclose(rounding + clipping, np.sum(error**2), rtol=1e-6)
    (_, all_rounding, none), (_, rounding, clipping), _ = (
        concepts.error_of(x, config) for _, config in concepts.RANGES
    )
    assert none == 0
    assert clipping > 0
    assert rounding + clipping < all_rounding
