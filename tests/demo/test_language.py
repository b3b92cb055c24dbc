"""The comparison of schemes on a language model."""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

import jaxquant as jq
from jaxquant import demo, tree

from . import llamas

VARIANTS = {
    "float32": demo.Variant(),
    "as stored": demo.Variant(as_stored=True),
    "four": demo.Variant(jq.W4A16),
    "keys": demo.Variant(store="int4"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "model.gguf"
    llamas.write_gguf(path, llamas.random_arrays())
    return demo.load_llama(path)


@functools.partial(jax.jit, static_argnames="store")
def all_logits(params, config, window, store):
    cache = demo.init_cache(params, config, 1, len(window), store)
    x, _ = demo.forward(params, config, window[None], cache)
    return demo.logits(params, x)[0]


def log_probabilities(model, params, window, store=jnp.float32):
    logits = np.asarray(all_logits(params, model.config, window, store), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.slow
def test_variants_are_measured_against_float32(model, monkeypatch):
    decode_speed, decoded = demo.language._decode_speed, []

    def first_decode_speed(*args):
        """Of the first variant; the others would compile two programs each."""
        decoded.append(args)
        return decode_speed(*args) if len(decoded) == 1 else 1.0

    monkeypatch.setattr(demo.language, "_decode_speed", first_decode_speed)
    ids = np.random.default_rng(0).integers(2, len(llamas.TOKENS), 40)
    windows = demo.windows(ids, 2, 16)
    np.testing.assert_array_equal(windows.reshape(-1), ids[:32])
    calls = []
    results = demo.compare_language(
        model, windows, VARIANTS, progress=lambda *call: calls.append(call)
    )
    assert calls == [(i + 1, 4, name) for i, name in enumerate(VARIANTS)]
    floats = demo.requantize(model.params, None)
    params = [floats, model.params, demo.requantize(floats, jq.W4A16), floats]
    exact = [log_probabilities(model, floats, w) for w in windows]
    for result, variant, weights in zip(results, VARIANTS.values(), params, strict=True):
        store = demo.STORES[variant.store]
        found = [log_probabilities(model, weights, w, store) for w in windows]
        divergences = [
            (np.exp(p) * (p - q)).sum(-1).mean() for p, q in zip(exact, found, strict=True)
        ]
        same = [np.mean(p.argmax(-1) == q.argmax(-1)) for p, q in zip(exact, found, strict=True)]
        np.testing.assert_allclose(result.divergence, np.mean(divergences), rtol=1e-3, atol=1e-6)
        assert result.agreement == np.mean(same)
        total = tree.report(floats, weights).total
        assert result.megabytes == total.bytes_after / 1e6
        assert result.bits_per_weight == pytest.approx(total.bits_per_weight)
        assert min(result.prefill, result.decode) > 0
    assert [store for *_, store in decoded] == [v.store for v in VARIANTS.values()]
    float32, as_stored, four, keys = results
    assert (float32.divergence, float32.agreement) == (pytest.approx(0, abs=1e-6), 1)
    assert as_stored.megabytes < 0.3 * float32.megabytes
    assert as_stored.divergence < 1e-6 < four.divergence
    elements = 2 * llamas.LAYERS * llamas.KV_HEADS
    assert float32.cache_kilobytes == elements * llamas.HEAD_SIZE * 4 / 1e3
    assert keys.cache_kilobytes == elements * (llamas.HEAD_SIZE / 2 + 4) / 1e3
    assert keys.divergence > 1e-6


@pytest.mark.slow
def test_the_time_of_one_window_does_not_include_compilation(model, monkeypatch):
    traced, measured = [], demo.language.time.perf_counter
    forward = demo.language.forward

    def slow(*args):
        traced.append(measured())
        return forward(*args)

    monkeypatch.setattr(demo.language, "forward", slow)
    clock = []
    monkeypatch.setattr(
        demo.language.time, "perf_counter", lambda: clock.append(measured()) or clock[-1]
    )
    monkeypatch.setattr(demo.language, "_decode_speed", lambda *args: 1.0)
    # A length that no other test has, so that it is traced here.
    windows = demo.windows(range(2, 25), 1, 23)
    demo.compare_language(model, windows, {"b": demo.Variant(store="int4")})
    assert len(traced) == 2  # Of float32 and of the variant.
    assert max(traced) < min(clock)


@pytest.mark.parametrize(("count", "found"), [(0, 0), (-1, 0), (3, 40)])
def test_windows_that_the_text_does_not_have_are_an_error(count, found):
    with pytest.raises(ValueError, match=f"got {count} windows of a text with {found} tokens"):
        demo.windows(range(40), count, 16)


def test_the_held_out_text_is_long_enough():
    text = demo.held_out_text()
    assert len(text) > 100_000
    assert "\n\n" not in text


def test_the_named_variants_are_the_rows_of_the_table():
    assert list(demo.VARIANTS)[:2] == ["float32", "as stored"]
    assert len(set(demo.VARIANTS.values())) == len(demo.VARIANTS)


def test_the_table_shows_the_results():
    result = demo.LanguageResult("name of it", 12.345, 4.2567, 46.08, 0.01234, 0.9876, 345.6, 23.45)
    table = demo.language_table([result, dataclasses.replace(result, name="other")])
    output = io.StringIO()
    rich.console.Console(file=output, width=150).print(table)
    text = output.getvalue()
    for part in ("name of it", "12.3", "4.26", "46.1", "0.0123", "0.988", "346", "23.4", "other"):
        assert part in text
    assert "the model's file is quantized" in text


def test_a_variant_is_stored_or_requantized():
    match = r"as_stored leaves parameters as they are; got it with scheme=.*Give one of them"
    with pytest.raises(ValueError, match=match):
        demo.Variant(jq.W8A8, as_stored=True)
