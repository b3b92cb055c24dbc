"""Multipliers and rotations folded into parameters: the model stays the same, or it is an error."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import ArrayConfig, core, quantize
from jaxquant.tree import Fold, FoldRotation, fold
from jaxquant.tree.fold import rotate_rows

from .trees import normal


def norm(x, gain):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain[None]


def model(width=24, hidden=40, seed=0):
    """A residual stream with two gated layers, biases and a head."""
    random = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(random.normal(size=shape) * shape[0] ** -0.5, jnp.float32)

    def layer():
        return {
            "norm": jnp.asarray(random.uniform(0.5, 2, width), jnp.float32),
            "gate": {"kernel": array(width, hidden)},
            "up": {"kernel": array(width, hidden), "bias": array(hidden)},
            "down": {"kernel": array(hidden, width), "bias": array(width)},
        }

    return {
        "embedding": array(11, width),
        "layers": [layer(), layer()],
        "norm": jnp.asarray(random.uniform(0.5, 2, width), jnp.float32),
        "head": array(11, width),
    }


def apply(params, tokens):
    x = params["embedding"][tokens]
    for layer in params["layers"]:
        seen = norm(x, layer["norm"])
        gate = jax.nn.silu(seen @ layer["gate"]["kernel"])
        up = seen @ layer["up"]["kernel"] + layer["up"]["bias"][None]
        x = x + (gate * up) @ layer["down"]["kernel"] + layer["down"]["bias"][None]
    return norm(x, params["norm"]) @ params.get("head", params["embedding"]).T


TOKENS = jnp.arange(11)
CHECK = apply, TOKENS
GAINS = [
    Fold("layers/*/norm", ["layers/*/gate/kernel", "layers/*/up/kernel"]),
    Fold("norm", [("head", -1)]),
]
ROTATION = FoldRotation(
    writers=["embedding", "layers/*/down/*"],
    readers=["layers/*/gate/kernel", "layers/*/up/kernel", ("head", -1)],
    norms=["norm", "layers/*/norm"],
)


def test_gains_move_into_the_kernels_that_follow():
    params = model()
    found = fold(params, GAINS, check=CHECK)
    for old, new in zip(params["layers"], found["layers"], strict=True):
        np.testing.assert_array_equal(new["norm"], np.ones(24))
        for name in ("gate", "up"):
            want = old[name]["kernel"] * old["norm"][:, None]
            np.testing.assert_allclose(new[name]["kernel"], want, rtol=1e-6)
        assert new["down"]["kernel"] is old["down"]["kernel"]
    np.testing.assert_allclose(found["head"], params["head"] * params["norm"][None], rtol=1e-6)


def test_multipliers_pass_through_a_gated_product():
    params, random = model(), np.random.default_rng(1)
    given = {f"layers/{i}/up/bias": random.uniform(0.1, 10, 40) for i in range(2)}
    item = Fold(["layers/*/up/bias", "layers/*/up/kernel"], "layers/*/down/kernel", given)
    found = fold(params, [item], check=CHECK)
    for i, (old, new) in enumerate(zip(params["layers"], found["layers"], strict=True)):
        m = given[f"layers/{i}/up/bias"]
        np.testing.assert_allclose(new["up"]["bias"], old["up"]["bias"] * m, rtol=1e-5)
        np.testing.assert_allclose(new["up"]["kernel"], old["up"]["kernel"] * m[None], rtol=1e-5)
        want = old["down"]["kernel"] / m[:, None]
        np.testing.assert_allclose(new["down"]["kernel"], want, rtol=1e-5)
    # One for all layers.
    item = Fold(["layers/*/up/bias", "layers/*/up/kernel"], "layers/*/down/kernel", m)
    fold(params, [item], check=CHECK)


def dense(block, channels, seed):
    """Q as a matrix, by definition."""
    signs = np.random.default_rng([seed, block]).choice([-1.0, 1.0], block)
    one = signs[:, None] * core.hadamard(block) / np.sqrt(block)
    return np.kron(np.eye(channels // block), one)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(("width", "block"), [(24, None), (24, 4), (384, None), (576, None)])
def test_a_residual_stream_is_rotated_by_one_matrix(width, block):
    params = model(width)
    rotation = FoldRotation(ROTATION.writers, ROTATION.readers, ROTATION.norms, block, seed=3)
    found = fold(params, [*GAINS, rotation], check=CHECK)
    q = dense(block or width, width, 3)
    np.testing.assert_allclose(q @ q.T, np.eye(width), 0, 1e-12)
    want = np.asarray(params["embedding"], np.float64) @ q
    np.testing.assert_allclose(found["embedding"], want, 0, 1e-6)
    old, new = params["layers"][1], found["layers"][1]
    for name in ("kernel", "bias"):
        want = np.asarray(old["down"][name], np.float64) @ q
        np.testing.assert_allclose(new["down"][name], want, 0, 1e-6)
    want = q.T @ np.asarray(old["up"]["kernel"] * old["norm"][:, None], np.float64)
    np.testing.assert_allclose(new["up"]["kernel"], want, 0, 2e-6)


@pytest.mark.parametrize("size", [12, 384, 576, 1536])
def test_rows_are_rotated_in_float64(size):
    x = np.random.default_rng(0).normal(size=(3, size))
    want = x @ core.hadamard(size).astype(np.float64) / np.sqrt(size)
    np.testing.assert_allclose(rotate_rows(x), want, 0, 1e-13)
    np.testing.assert_allclose(np.linalg.norm(rotate_rows(x), axis=1), np.linalg.norm(x, axis=1))


def test_stacked_kernels_with_several_contracted_axes():
    gain = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, (2, 12)), jnp.float32)
    params = {
        "gain": gain,
        "read": jnp.asarray(normal(2, 3, 4, 5)),
        "write": jnp.asarray(normal(2, 7, 3, 4)),
        "out": jnp.asarray(normal(2, 5, 3, 4)),
    }

    def apply(params, x):
        flat = (x[None] * params["gain"][:, None]).reshape(2, -1, 3, 4)
        heads = jnp.einsum("lbd,ldhk->lbhk", jnp.ones((2, 6, 7)), params["write"])
        mixed = jnp.einsum("lbhk,lnhk->lbn", heads, params["out"])
        return jnp.einsum("lbhk,lhkn->lbn", flat, params["read"]), mixed

    folds = [
        Fold("gain", [("read", (1, 2))]),
        Fold([("write", (-2, -1))], [("out", (-2, -1))], 1 / gain),
        FoldRotation([("write", -1)], [("out", -1)], block=4),
        FoldRotation([("write", (-2, -1))], [("out", (-2, -1))]),
    ]
    found = fold(params, folds, check=(apply, jnp.asarray(normal(6, 12))))
    np.testing.assert_array_equal(found["gain"], np.ones((2, 12)))
    want = params["read"] * gain.reshape(2, 3, 4, 1)
    np.testing.assert_allclose(found["read"], want, rtol=1e-6)
    assert found["out"].shape == (2, 5, 3, 4)


@pytest.mark.parametrize(
    ("folds", "text"),
    [
        ([Fold("layers/*/norm", "layers/*/up/kernel")], r"up to 1e-05; got a relative error of \d"),
        ([ROTATION], "norm must be 1 between a rotation and its inverse; got other"),
        ([Fold("norms", "head")], "'norms' matches no leaf; got embedding, head, layers/0/down/b"),
        ([Fold("norm", "embedding"), ROTATION], "embedding must have 24 channels along axis -2"),
        ([Fold("norm", ["head", "hea*"])], "Patterns must match a leaf once; got head twice"),
        (
            [Fold("layers/*/norm", "head")],
            r"layers/0/norm has no target .* same, \('0',\); got head",
        ),
        (
            [Fold("layers/0*/norm", "layers/*/up/kernel", np.ones(24))],
            r"layers/0/norm has no target whose wildcards match the same, \('',\)",
        ),
        (
            [Fold("re:layers/(0)/norm", "layers/*/up/kernel")],
            "layers/1/up/kernel has no source whose wildcards match the same; got layers/0/norm",
        ),
        ([Fold(["norm", "head"], "embedding")], "must be the gain of one norm; got norm, head"),
        ([Fold("norm", "embedding", np.zeros(24))], "multiplier must be finite and not 0"),
        (
            [Fold("layers/*/up/bias", "layers/*/down/kernel", {"layers/0/up/bias": np.ones(40)})],
            "must have an entry for each layer; got none for layers/1/up/bias",
        ),
        ([Fold("norm", ("head", 3))], r"head has 2 axes; got axis \(3,\)"),
        ([Fold("norm", cast("Any", [3]))], "A pattern must be a str, or a pair .*; got 3"),
        (
            [Fold("head", "head")],
            "head cannot be a source and a target at once. If an embedding is",
        ),
        (["norm"], "folds must be Fold or FoldRotation; got 'norm'"),
        (
            [FoldRotation(["embedding", ("head", -2)], ("head", -1), block=1)],
            "head must be rotated along one axis; got -2 as a writer and -1 as a reader",
        ),
        (
            [FoldRotation("embedding", ("head", -1), block=5)],
            "embedding: block must divide the number of channels, 24; got 5",
        ),
    ],
)
def test_folds_that_do_not_fit_are_errors(folds, text):
    with pytest.raises(ValueError, match=text):
        fold(model(), folds, check=CHECK)


def test_a_gain_of_zero_cannot_become_one():
    params = model()
    params["norm"] = params["norm"].at[3].set(0)
    with pytest.raises(ValueError, match=r"norm must have no zeros, .*; got 1 of 24"):
        fold(params, GAINS[1:], check=CHECK)


def test_tied_embeddings_are_errors_until_the_model_has_its_own_head():
    params = {k: v for k, v in model().items() if k != "head"}
    readers = [*ROTATION.readers[:-1], ("embedding", -1)]
    tied = [GAINS[0], FoldRotation(ROTATION.writers, readers, ["layers/*/norm"])]
    with pytest.raises(ValueError, match="an embedding is tied to the head"):
        fold(params, tied, check=CHECK)
    # Without a gain before the head, a tied embedding is rotated once.
    plain = params | {"norm": jnp.ones(24)}
    found = fold(plain, tied, check=CHECK)
    assert not np.allclose(found["embedding"], params["embedding"], 0, 0.1)
    # A gain cannot be folded into it.
    with pytest.raises(ValueError, match="relative error"):
        fold(params, [Fold("norm", [("embedding", -1)])], check=CHECK)
    untied = params | {"head": params["embedding"]}
    fold(untied, [*GAINS, ROTATION], check=CHECK)


def test_quantized_parameters_and_integers_are_errors():
    params = model()
    params["head"] = quantize(params["head"], ArrayConfig(), axis=1)
    with pytest.raises(ValueError, match=r"head must be a .* array; got QTensor.*Fold before"):
        fold(params, GAINS[1:], check=CHECK)


def test_rounding_in_float32_is_told_from_errors():
    random = np.random.default_rng(0)
    gain, w = random.uniform(0.5, 2, 64), random.normal(size=(64, 64))
    params = {"gain": jnp.asarray(gain, jnp.float32), "w": jnp.asarray(w, jnp.float32)}
    batch = random.normal(size=(2000, 64)).astype(np.float32), np.full((1, 64), 1e5, np.float32)

    def apply(params, batch):
        # In float32, cancellation loses more than the tolerance.
        x, large = (a.astype(params["w"].dtype) for a in batch)
        return (large + (x * params["gain"][None]) @ params["w"]) - large

    def in_float32(params, batch):
        return apply(jax.tree.map(lambda p: p.astype(jnp.float32), params), batch)

    factor = random.uniform(0.1, 10, 64)
    fold(params, [Fold("gain", "w", factor)], check=(apply, batch), tolerance=1e-6)
    with pytest.raises(ValueError, match=r"got a relative error of .* in float64\. A fold misses"):
        fold(params, [Fold("gain", "w", factor)], check=(in_float32, batch), tolerance=1e-6)
    with pytest.raises(ValueError, match=r"got a relative error of .* in float64\. A fold misses"):
        fold(params, [FoldRotation("gain", "w")], check=(apply, batch))


def test_the_check_sees_nan_and_has_a_tolerance():
    params = model()
    with pytest.raises(ValueError, match="got a relative error of nan in"):
        fold(params, [Fold("norm", [("head", -1)], np.full(24, 1e-44))], check=CHECK)
    wrong = [Fold("layers/*/norm", "layers/*/up/kernel")]
    fold(params, wrong, check=CHECK, tolerance=10)
