"""The decoder against a slow NumPy decoder without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from benchmarks import end_to_end
from benchmarks.decoder import DecoderConfig, empty_cache, generate, random_params, step
from benchmarks.products import of_xla

from .slow_transformer import attend, normalize

CONFIG = DecoderConfig(layers=2, width=32, heads=4, vocabulary=37, length=14)
HEADS = 4


@pytest.fixture(scope="module")
def params():
    """Parameters whose norm scales differ from one."""
    made = random_params(CONFIG)
    scales = np.random.default_rng(1).uniform(0.5, 1.5, (3, 2, 32)).astype(np.float32)
    for layer, scale in zip(made["layers"], scales, strict=False):
        layer["norms"] = jnp.asarray(scale)
    return made | {"norm": jnp.asarray(scales[2, 0])}


def logits_of(params, tokens):
    """Logits of each position given all tokens up to it. Vaswani et al. 2017, section 3."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = params["tokens"][tokens] + params["positions"][: len(tokens)]
    for weights in params["layers"]:
        x = x + attend(normalize(x, weights["norms"][0]), weights, (0,) * HEADS)
        up = normalize(x, weights["norms"][1]) @ weights["up"]["kernel"]
        x = x + np.maximum(up, 0) @ weights["down"]["kernel"]
    return normalize(x, params["norm"]) @ params["head"]["kernel"]


@pytest.mark.slow
def test_steps_with_a_cache_equal_the_slow_decoder(params):
    tokens = np.random.default_rng(0).integers(0, 37, (2, 9))
    wanted = np.stack([logits_of(params, row) for row in tokens])
    cache, found, start = empty_cache(CONFIG, 2), [], 0
    for count in (4, 4, 1):
        part = jnp.asarray(tokens[:, start : start + count], jnp.int32)
        logits, cache = jax.jit(step)(params, CONFIG, part, cache, start)
        found.append(logits)
        start += count
    np.testing.assert_allclose(np.concatenate(found, 1), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_generation_is_greedy(params):
    prompt = np.random.default_rng(2).integers(0, 37, (2, 5))
    tokens, logits = generate(params, CONFIG, jnp.asarray(prompt, jnp.int32), 10)
    assert tokens.shape == (2, 10)
    for row, first, generated in zip(prompt, logits, np.asarray(tokens), strict=True):
        text = np.concatenate([row, generated])
        wanted = logits_of(params, text[:-1])[len(row) - 1 :]
        np.testing.assert_allclose(first, wanted[0], rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(generated, wanted.argmax(-1))


def test_a_cache_that_is_too_short_raises(params):
    with pytest.raises(ValueError, match=r"prompt and all but the last token, 5 \+ 10; got 14"):
        generate(params, CONFIG, jnp.zeros((1, 5), jnp.int32), 11)


@pytest.mark.slow
def test_a_quantized_decoder_is_close_to_float32_and_compared_with_it(params, monkeypatch):
    monkeypatch.setattr(end_to_end, "BUDGET", 0.0)
    others = [of_xla("bfloat16")]
    models = end_to_end.decoders(params, others, ["W8A8", "bfloat16"])
    assert list(models) == ["float32", "W8A8", "W8A8 g32", *(c.name for c in others)]
    kernels = models["W8A8"][0]["layers"][1]
    assert isinstance(kernels["down"]["kernel"], jq.QTensor)
    assert kernels["norms"] is params["layers"][1]["norms"]
    results = end_to_end.decode(models, CONFIG, 4, 3)
    assert results[0]["error"] == 0
    assert all(0 < r["error"] < 0.1 for r in results[1:])
    assert all(r["milliseconds"] > 0 and r["bytes"] > 0 for r in results)
    assert results[1]["bytes"] < results[0]["bytes"]
