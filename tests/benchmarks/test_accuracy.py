"""The accuracy suite on a tiny language model."""

import json
import pathlib
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from benchmarks import machine
from benchmarks.__main__ import main
from benchmarks.accuracy import cost, encoder, language, peers, picture, rows, tables
from benchmarks.accuracy.trees import Trees, bits_per_weight, by_stack
from jaxquant.demo import llama
from jaxquant.demo.text import Tokens
from jaxquant.methods import MeanSquare

from ..demo import encoders

ROOT = pathlib.Path(__file__).parents[2]
WIDTH, HIDDEN, VOCABULARY, LAYERS = 96, 192, 60, 4
WORDS = ("cat", "dog", "tree", "lake")


class Tokenizer:
    """Characters as ids."""

    def encode(self, text):
        return [ord(c) % VOCABULARY for c in text]


def tiny_model(**_):
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape) * shape[-1] ** -0.5, jnp.float32)

    sizes = {"query": (WIDTH, WIDTH), "key": (48, WIDTH), "value": (48, WIDTH)}
    sizes |= {"out": (WIDTH, WIDTH), "gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH)}
    layers = {k: {"kernel": normal(LAYERS, *v)} for k, v in sizes.items()}
    for name in ("query", "key"):  # They need fewer bits.
        layers[name]["kernel"] *= 0.01
    layers["down"] = {"kernel": normal(LAYERS, WIDTH, HIDDEN)}
    layers |= {k: jnp.ones((LAYERS, WIDTH)) for k in ("attention_norm", "mlp_norm")}
    params = {
        "embedding": 3 * normal(VOCABULARY, WIDTH),
        "layers": (layers,),
        "norm": jnp.ones(WIDTH),
        "frequencies": jnp.asarray([1.0] * 12),
    }
    return language.LanguageModel(params, llama.LlamaConfig(4, 2, LAYERS, 1e-5), Tokenizer())


@pytest.fixture(scope="module")
def trees():
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, 16)).astype(np.int32)
    return Trees(tiny_model(), list(language.batches(tokens)))


SIZES = {"4.5": 4 + 16 / 32, "3.2": 3 + (16 + 4) / 96, "2.6": 2 + (16 + 2) / 32, "W4A4": 4.5}


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("bits", SIZES)
def test_bits_count_packed_codes_scales_and_zero_points(bits):
    q = jq.quantize(jnp.ones((8, WIDTH)), rows.CONFIGS[bits].weights, axis=1)
    assert bits_per_weight([q, jnp.ones(3)]) == pytest.approx(SIZES[bits])


@pytest.mark.slow
def test_layers_differ_in_bits_within_those_of_the_config(trees, capsys):
    tree = trees.quantized("4.5", "allocated, nearest")
    leaves = jax.tree.leaves(tree["layers"], is_leaf=jq.tree.is_quantized)
    kinds = [x.format for x in leaves if jq.tree.is_quantized(x)]
    assert len(tree["layers"]) == 2
    assert len(set(kinds)) > 1
    assert 4.2 < bits_per_weight(tree["layers"]) <= 4.5
    assert "Allocation of bits" in capsys.readouterr().out


def test_statistics_of_stacks_of_layers_are_those_of_their_layers():
    whole = MeanSquare(np.arange(8.0).reshape(4, 2), np.arange(1.0, 5))
    found = by_stack({"layers/0/up/kernel": {MeanSquare: whole}})
    parts = [found[f"layers/{i}/up/kernel"][MeanSquare] for i in range(2)]
    assert [len(x.count) for x in parts] == [3, 1]
    np.testing.assert_array_equal(np.concatenate([x.finish() for x in parts]), whole.finish())


@pytest.mark.slow
def test_tuned_rows_are_closer_to_the_float_model_on_the_batches(trees, monkeypatch):
    pytest.importorskip("optax")
    monkeypatch.setitem(rows.ROWS, "tuned", rows.Row(tunes="nearest"))
    judge = language.Judge(trees.model, np.concatenate(trees.batches))
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it.
        trees.quantized("3.2", "tuned")
    before, after = (
        judge.distance(trees.quantized("3.2", name)).divergence for name in ("nearest", "tuned")
    )
    assert after < before


@pytest.mark.slow
@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_peers_are_closer_than_a_quarter_of_the_weights(trees, peer):
    pytest.importorskip(peer.module)
    layers = trees.model.params["layers"][0]
    statistics = trees.statistics
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = peers.quantized(peer, layers, statistics)
    for name in ("up", "down"):
        exact, decoded = np.asarray(layers[name]["kernel"]), np.asarray(found[name]["kernel"])
        assert 0 < np.linalg.norm(decoded - exact) < np.linalg.norm(exact) / 4


@pytest.mark.slow
def test_a_run_that_is_cut_off_has_written_its_rows(tmp_path, monkeypatch, capsys):
    path = tmp_path / "found.json"
    monkeypatch.setattr(language, "load_model", tiny_model)
    monkeypatch.setattr(language, "texts", lambda: {"a": "plain " * 900, "b": "other " * 900})
    monkeypatch.setattr(rows, "ROWS", {"nearest": rows.Row(), "wrong": rows.Row(tunes="missing")})
    monkeypatch.setattr(peers, "PEERS", ())
    monkeypatch.setattr(machine, "description", lambda: {"processor": "a test"})
    options = f"--bits 4.5 --texts 1 --seeds 1 --windows 1 --json {path}"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--suite", "accuracy", *options.split()])
    with pytest.raises(KeyError, match="missing"):
        main()
    (row,) = json.loads(path.read_text())["results"]
    assert (row["name"], row["text"], row["bits_per_weight"]) == ("nearest", "a", 4.5)
    assert row["divergence"] > 0
    assert "name='nearest'" in capsys.readouterr().out


def test_the_tables_of_the_docs_are_those_of_the_results():
    text = (ROOT / "docs/accuracy.md").read_text()
    for path in sorted(tables.RESULTS.glob("*.json")):
        (lines,) = tables.tables(json.loads(path.read_text())["results"])
        assert "\n".join(lines) in text
    repeated = sorted(tables.REPEATED.glob("*.json"))
    assert [path.stem for path in repeated] == ["channels", "seeds"]
    for path in repeated:
        assert "\n".join(tables.spread(json.loads(path.read_text())["results"])) in text


def test_tables_are_relative_to_nearest_and_start_with_the_closest(capsys, monkeypatch, tmp_path):
    found = [
        {"name": name, "bits": "3.2", "bits_per_weight": 3.21, "divergence": divergence,
         "agreement": 0.5, "perplexity": 20.0, "seconds": 3.4}
        for name, divergence in (("nearest", 0.5), ("GPTQ", 0.1))
    ]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps({"results": found}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "REPEATED", tmp_path / "repeated")
    tables.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| 3.21 bits | mean KL |")
    assert lines[2:4] == [
        "| GPTQ | 0.100 | 0.20 | 0.500 | 20.0 | 3 |",
        "| nearest | 0.500 | 1.00 | 0.500 | 20.0 | 3 |",
    ]


def test_repeated_rows_are_shown_as_mean_and_half_range_for_each_text():
    found = [
        {"name": name, "bits": "3.2", "text": text, "seed": seed, "divergence": divergence}
        for name, text, seed, divergence in (
            ("nearest", "a", 0, 2.0), ("nearest", "a", 1, 4.0), ("nearest", "b", 0, 1.0),
            ("GPTQ", "a", 0, 1.0), ("GPTQ", "a", 1, 0.5),
        )
    ]  # fmt: skip
    assert tables.spread(found) == [
        "| bits | method | tested on a: mean KL | of nearest | tested on b: mean KL | of nearest |",
        "|---|---|---|---|---|---|",
        "| 3.2 | nearest | 3.000 ± 1.000 | 1.00 | 1.000 | 1.00 |",
        "| 3.2 | GPTQ | 0.750 ± 0.250 | 0.25 |  |  |",
    ]


def test_the_picture_has_a_line_for_each_method_that_quantizes_weights_alone(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    found = [
        {"name": name, "bits": bits, "bits_per_weight": 3.0, "divergence": 0.1}
        for name, bits in (("nearest", "3.2"), ("GPTQ", "3.2"), ("rotated", "W4A4"))
    ]
    source, path = tmp_path / "found.json", tmp_path / "found.svg"
    source.write_text(json.dumps({"results": found}))
    monkeypatch.setattr(sys, "argv", ["picture", str(path), str(source)])
    picture.main()
    text = path.read_text()
    assert [name in text for name in ("nearest", "GPTQ", "rotated")] == [True, True, False]


def test_the_fit_of_seconds_over_sizes_finds_the_terms():
    parts = np.array([0.5, 2e-9, 3e-8])
    seconds = [float(parts @ [1, k**3, n * k**2]) for n, k in cost.SIZES]
    np.testing.assert_allclose(cost.fitted(cost.SIZES, seconds), parts, rtol=1e-6)
    (cells,) = [list(c.cells) for c in cost.estimate(parts).columns if c.header == "seconds each"]
    assert cells[0] == f"{0.5 + 3.2e-8 * 4096**3:.0f}"


@pytest.mark.slow
def test_tuned_scales_and_layers_in_order_bring_the_vectors_of_an_encoder_closer(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("optax")
    encoders.write_encoder(tmp_path)
    config = jq.ArrayConfig(format=jq.INT4, group_size=16, scale_dtype="bfloat16")
    monkeypatch.setattr(encoder, "CONFIGS", {"4.63": jq.Scheme(config)})
    monkeypatch.setattr(encoder, "packaged_encoder", lambda: tmp_path)
    monkeypatch.setattr(encoder, "tokenize", partial(encoder.tokenize, length=16))
    sentences = [f"The {a} sat on the {b} {c}." for a in WORDS for b in WORDS for c in WORDS]
    monkeypatch.setattr(encoder, "documentation_sentences", lambda _: sentences)
    command = ["encoder", "--bits", "4.63", "--only", "nearest", "Qronos", "SmoothQuant"]
    monkeypatch.setattr(sys, "argv", [*command, "nearest, tuned"])
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it.
        encoder.main()
    rows = re.findall(r"│ 4.63 │ (\w+(?:, tuned)?) +│ (\S+) +│ (\S+) +│", capsys.readouterr().out)
    # Activations are not quantized here.
    assert [name for name, *_ in rows] == ["nearest", "Qronos", "nearest, tuned"]
    for row in rows[1:]:
        assert 1 - float(row[2]) < 0.9 * (1 - float(rows[0][2])), row


def test_sentences_of_one_length_are_a_batch_without_padding():
    mask = np.arange(12) < np.array([3, 5, 9, 4, 12])[:, None]
    ids = np.where(mask, np.arange(1, 13) + 100 * np.arange(5)[:, None], 0)
    found = encoder._by_length(Tokens(ids.reshape(5, 1, 12), mask.reshape(5, 1, 12), 5))
    expected = [ids[[1, 3], :4], ids[[2], :8], ids[[4], :12]]
    assert len(found) == 3
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "name, configs",
    [
        ("nearest", set(rows.CONFIGS)),
        ("HQQ", {"4.6", "3.2", "2.6"}),
        ("importance, NF4", {"4.5", "W4A8", "W4A4"}),
        ("QEP, IQ3_NL", {"3.2"}),
        ("QEP, IQ2_NL", {"2.6"}),
        ("allocated, nearest", {"4.5", "3.2"}),
    ],
)
def test_rows_are_run_for_the_configs_that_they_make_sense_for(name, configs):
    row = rows.ROWS[name]
    assert {bits for bits in rows.CONFIGS if row.is_for(bits)} == configs
    for bits in configs if row.format else ():
        weights, replaced = row.scheme(bits).weights, rows.CONFIGS[bits].weights
        assert weights.symmetric
        assert weights.format.dense_bits == replaced.format.dense_bits
