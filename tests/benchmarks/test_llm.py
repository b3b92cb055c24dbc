"""What the comparison of language models runs, and how it reports."""

import argparse
import importlib.util
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from benchmarks import llm, llm_tables
from jaxquant import demo

from ..demo import llamas


@pytest.fixture
def small(tmp_path, monkeypatch):
    path = tmp_path / "small.gguf"
    llamas.write_gguf(path, llamas.random_arrays())
    monkeypatch.setattr(demo, "packaged_llama", lambda: path)
    return demo.load_llama(path)


def test_decoding_starts_after_the_same_tokens_each_time(small):
    params = demo.requantize(small.params, None)
    found = llm.Ours(params, small.config)
    run = found.decode(2, 3)
    first, second = run(), run()
    np.testing.assert_array_equal(first, second)

    # Of a cache of zeros: keys and values of no token.
    cache = demo.init_cache(params, small.config, 2, 3 + llm.STEPS, jnp.bfloat16)
    lengths = jnp.full_like(cache.lengths, 3)
    cache = cache.__class__(**{**vars(cache), "lengths": lengths})
    token = jnp.zeros((2, 1), jnp.int32)
    for _ in range(llm.STEPS):
        token, cache = demo.next_token(params, small.config, token, cache)
        token = token[:, None]
    np.testing.assert_array_equal(first, token)


def test_prompts_give_the_next_token(small):
    params = demo.requantize(small.params, None)
    run = llm.Ours(params, small.config).prompt(5)
    cache = demo.init_cache(params, small.config, 1, 5, jnp.bfloat16)
    wanted, _ = demo.next_token(params, small.config, jnp.zeros((1, 5), jnp.int32), cache)
    for _ in range(2):
        np.testing.assert_array_equal(run(), wanted)


def test_parts_hold_every_product_with_a_parameter_and_all_attention(small):
    params = demo.requantize(small.params, jq.W8A8)
    parts = llm.Ours(params, small.config).parts(2, 4, 3)
    assert list(parts) == ["products", "attention"]
    for part in parts.values():
        assert np.all(np.isfinite(np.asarray(part(), np.float32)))
        part()  # The cache was donated.
    x = jnp.ones((1, 2, params["norm"].shape[0]))
    cache = demo.init_cache(params, small.config, 1, 8)
    _, after = llm._attention(small.config, x, cache)
    np.testing.assert_array_equal(after.lengths, 2)  # Of each layer.
    np.testing.assert_array_equal(after.keys[:, :, :, :2] != 0, True)
    rows = jq.explain(llm._products, params, x)
    step = jq.explain(
        lambda p, t, c: demo.next_token(p, small.config, t, c)[0],
        params,
        jnp.zeros((1, 2), jnp.int32),
        demo.init_cache(params, small.config, 1, 4),
    )
    assert sum(r.times or 1 for r in rows) == sum(r.times or 1 for r in step)


def test_the_suite_prints_each_contender(small, monkeypatch, capsys):
    monkeypatch.setattr(llm, "BUDGET", 0.0)
    monkeypatch.setattr(llm, "DECODED", ((1, 4),))
    monkeypatch.setattr(llm, "PROMPTS", (6,))
    monkeypatch.setattr(llm, "PARTS", {"1 x 4": (1, 4, llm.STEPS), "6 tokens": (6, 0, 1)})
    monkeypatch.setattr(llm.machine, "bandwidth", lambda: 1e9)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = llm.suite(argparse.Namespace(only=["as stored"]))
    names = ["float32", "as stored"]
    for results in (found["decoding"], found["prompts"], found["parts"][:2]):
        assert [r["contender"] for r in results] == names
    assert found["decoding"][0]["speed"] == 1
    assert all(r["bandwidth"] > 0 for r in found["decoding"])
    assert {r["column"] for r in found["parts"]} == {"1 x 4", "6 tokens"}
    assert found["not_installed"] == ["llama.cpp"]
    printed = capsys.readouterr().out
    assert "as stored" in printed
    assert "Not installed: llama.cpp." in printed


def test_the_tables_of_the_docs_are_those_of_the_results():
    text = (pathlib.Path(__file__).parents[2] / "docs/speed.md").read_text()
    found = llm_tables.tables(json.loads(llm_tables.RESULTS.read_text()))
    assert len(found) == 3
    for lines in found.values():
        assert "\n".join(lines) in text


def test_the_docs_compare_with_llama_cpp_as_the_results_do():
    text = " ".join((pathlib.Path(__file__).parents[2] / "docs/speed.md").read_text().split())
    found = json.loads(llm_tables.RESULTS.read_text())
    times = {(r["contender"], r["column"]): r["milliseconds"] for r in found["decoding"]}
    times |= {(r["contender"], r["column"]): r["milliseconds"] for r in found["prompts"]}

    def faster(ours, theirs, column):
        return times[f"llama.cpp {theirs}", column] / times[ours, column]

    def both(column):
        four, eight = (faster(f"W{b}A8 g32", f"Q{b}_0", column) for b in (4, 8))
        return f"{four:.1f}", f"{eight:.1f}"

    assert (
        "W4A8 g32 is {} times as fast as llama.cpp's Q4_0, and W8A8 g32 {} times".format(
            *both("1 x 128")
        )
        in text
    )
    assert "16 sequences of 1,024 tokens, it is {} and {} times".format(*both("16 x 1024")) in text
    assert "512 tokens {} and {} times".format(*both("512 tokens")) in text
    assert "2,048 tokens {} and {} times".format(*both("2048 tokens")) in text
    columns = {column for _, column in times}
    speeds = [faster("W8A8", "Q8_0", column) for column in columns]
    assert f"is {min(speeds):.1f} to {max(speeds):.1f} times as fast as Q8_0" in text


@pytest.mark.slow
def test_llama_cpp_continues_as_we_do(tmp_path):
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp is not installed")
    try:
        models, _ = llm.contenders(tmp_path, ["llama.cpp float32"])
    except demo.NotInstalledError:
        pytest.skip("the model is not installed")
    ours, theirs = models["float32"], models["llama.cpp float32"]
    for run in (theirs.prompt(7), theirs.prompt(7)):
        np.testing.assert_array_equal(run(), ours.prompt(7)())
    # Both sequences have the same tokens.
    run = theirs.decode(2, 5)
    first = run()
    np.testing.assert_array_equal(first, run())
    assert first[0] == first[1]
