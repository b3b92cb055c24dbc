import dataclasses
import io

import numpy as np
import pytest
import rich.console

from jaxquant import INT2, W8A8, W8A16, ArrayConfig, demo, tree

from . import encoders

SCHEMES = {"eight": W8A8, "two": ArrayConfig(format=INT2)}


@pytest.fixture(scope="module")
def encoder(tiny):
    folder, _ = tiny
    params, config = demo.load_encoder(folder)
    # The last batch is padded.
    return params, config, demo.tokenize(encoders.sentences(30), folder, length=16, batch_size=8)


def embed_all(params, config, tokens):
    batches = zip(tokens.ids, tokens.mask, strict=True)
    vectors = np.concatenate([demo.embed(params, config, ids, mask) for ids, mask in batches])
    return vectors[: tokens.count].astype(np.float64)


def neighbours(vectors):
    """The ten nearest neighbours of each sentence, as sets."""
    sets = []
    for i, vector in enumerate(vectors):
        distances = np.linalg.norm(vectors - vector, axis=1)
        distances[i] = np.inf
        sets.append(set(np.argsort(distances)[:10].tolist()))
    return sets


@pytest.mark.slow
def test_compare_measures_float32_and_each_scheme(encoder):
    params, config, tokens = encoder
    calls = []

    first, *results = demo.compare(
        params, config, tokens, SCHEMES, progress=lambda *call: calls.append(call)
    )

    assert calls == [(1, 3, "float32"), (2, 3, "eight"), (3, 3, "two")]
    assert [first.name, *(r.name for r in results)] == [name for *_, name in calls]
    assert (first.overlap, first.bits_per_weight) == (1, 32)
    assert first.cosine == pytest.approx(1)
    vectors = embed_all(params, config, tokens)
    for result in results:
        quantized = tree.quantize(params, tree.default_rules(SCHEMES[result.name], axis=-1))
        found = embed_all(quantized, config, tokens)
        cosine = np.mean(np.sum(found * vectors, 1))
        pairs = zip(neighbours(found), neighbours(vectors), strict=True)
        overlap = np.mean([len(a & b) for a, b in pairs]) / 10
        total = tree.report(params, quantized).total
        np.testing.assert_allclose(result.cosine, cosine, rtol=1e-5)
        np.testing.assert_allclose(result.overlap, overlap, atol=0.011)
        assert result.megabytes == total.bytes_after / 1e6
        assert result.bits_per_weight == total.bits_per_weight
        assert result.milliseconds > 0
        assert result.ratio > 0
    eight, two = results
    assert eight.cosine > 0.99 > two.cosine
    assert eight.overlap > 0.8 > two.overlap
    assert eight.megabytes > two.megabytes


def test_the_named_schemes_are_the_rows_of_the_table():
    assert {"W8A8", "W4A16 g32 asymmetric", "NVFP4A16"} <= set(demo.SCHEMES)
    assert len(set(demo.SCHEMES.values())) == len(demo.SCHEMES)


def test_fewer_sentences_than_neighbours_raise(encoder, tiny):
    params, config, _ = encoder
    for count in (0, 10):
        tokens = demo.tokenize(encoders.sentences(count), tiny[0], length=16)
        text = f"tokens must hold 11 sentences or more, .* 10 neighbours; got {count}. Tokenize"
        with pytest.raises(ValueError, match=text):
            demo.compare(params, config, tokens, {"W8A16": W8A16})


RESULT = demo.Result("name of it", 12.345, 4.2567, 0.98765, 0.8765, 3.456, 1.234)


def test_the_table_shows_the_results():
    output = io.StringIO()
    slow = dataclasses.replace(RESULT, name="slow", ratio=0.5)
    table = demo.table([RESULT, slow])
    rich.console.Console(file=output, width=150).print(table)
    text = output.getvalue()
    for part in ("name of it", "12.3", "4.26", "0.9877", "0.876", "3.46", "1.23", "slow", "0.50"):
        assert part in text
    assert [row.style for row in table.rows] == [None, "red"]
