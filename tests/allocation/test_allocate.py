"""Scores against per-row gradients by hand, and choices against what quantized models compute."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.allocation import dense_bits, random_projection, stored_bits

W2 = jq.ArrayConfig(format=jq.INT2, group_size=16, symmetric=False)
W4 = jq.ArrayConfig(format=jq.INT4, group_size=16)
OPTIONS = {"2 bits": W2, "4 bits": W4, "8 bits": jq.W8A16}
M, K, N, H, D, E = 6, 32, 48, 4, 8, 3


def normal(*shape, seed=0):
    size = shape[-2] ** -0.5 if len(shape) > 1 else 1
    return jnp.asarray(size * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def sines(outputs, key):
    """A loss without randomness, whose slopes differ between rows and outputs."""
    del key
    return jnp.sum(jnp.sin(3 * outputs))


# The shape of w; its contracted axes; a product (x, w) -> (rows..., outputs...); the shape of x.
PRODUCTS = {
    "kernel": ((K, N), -2, lambda x, w: x @ w, (M, K)),
    "rows": ((N, K), -1, lambda x, w: x @ w.T, (M, K)),
    "on the left": ((N, K), -1, lambda x, w: (w @ x.T).T, (M, K)),
    "heads out": ((K, H, D), 0, lambda x, w: jnp.einsum("mk,khd->mhd", x, w), (M, K)),
    "heads in": ((H, D, N), (0, 1), lambda x, w: jnp.einsum("mhd,hdn->mn", x, w), (M, H, D)),
    "experts": ((E, K, N), -2, lambda x, w: jnp.einsum("emk,ekn->emn", x, w), (E, M, K)),
    "batch on the left": (
        (E, K, N),
        -2,
        lambda x, w: jnp.einsum("ekn,emk->enm", w, x).swapaxes(1, 2),
        (E, M, K),
    ),
    "ragged": (
        (E, K, N),
        -2,
        lambda x, w: jax.lax.ragged_dot(x, w, jnp.array([1, 0, 5])),
        (M, K),
    ),
    "scanned": (
        (E, K, N),
        -2,
        lambda x, w: jax.lax.scan(lambda c, w: (c, x @ w), 0, w)[1],
        (M, K),
    ),
    "mapped": ((K, N), -2, lambda x, w: jax.vmap(lambda row: row @ w)(x), (M, K)),
}


def by_hand(product, x, w, dw, loss):
    """1/2 sum over rows of (g^T dW x)^2: all that dW adds to one row of the result."""
    y = product(x, w)
    g, moved = np.asarray(jax.grad(loss)(y)), np.asarray(product(x, dw))
    outputs = 2 if y.ndim == 3 and w.shape == (K, H, D) else 1
    return np.square((g * moved).reshape(*y.shape[: y.ndim - outputs], -1).sum(-1)).sum() / 2


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", PRODUCTS)
def test_scores_are_sums_over_rows_of_squared_derivatives(name):
    shape, axis, product, rows = PRODUCTS[name]
    w, x, after = normal(*shape), normal(*rows, seed=1) * 4, normal(5, seed=2)
    config = dataclasses.replace(W4, group_size=None)
    options: dict[str, Any] = {"4 bits": config, "8 bits": jq.W8A16}

    def apply(params, x):
        return jnp.tanh(product(x, params["w"])) * after[0]

    rules = jq.Rule("w", jq.W8A16, axis=axis)
    found = jq.allocate(apply, {"w": w}, [x], options, 9.0, loss=sines, rules=rules)
    count = np.prod(product(x, w).shape[:-1])
    for got, option in zip(found.rows[0].scores, options.values(), strict=True):
        weights = option.weights if isinstance(option, jq.Scheme) else option
        dw = jq.quantize(w, weights, axis).dequantize() - w
        want = by_hand(product, x, w, dw, lambda y: sines(jnp.tanh(y) * after[0], None))
        # Errors are kept in bfloat16.
        np.testing.assert_allclose(got, want / count, rtol=0.02)


def two_layers(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def parameters(seed=0):
    return {"a": normal(K, N, seed=seed), "b": normal(N, 40, seed=seed + 1)}


FEW = {"4 bits": dataclasses.replace(W4, group_size=None), "8 bits": jq.W8A16}


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("row_axes", [1, 2, None])
def test_rows_of_further_axes_are_added_before_they_are_squared(row_axes):
    w, x = normal(K, N), normal(3, M, K, seed=1) * 4
    config = {"4 bits": dataclasses.replace(W4, group_size=None)}

    def apply(params, x):
        return x @ params["w"]

    found = jq.allocate(apply, {"w": w}, [x], config, 9.0, loss=sines, row_axes=row_axes)
    dw = jq.quantize(w, config["4 bits"]).dequantize() - w
    each = np.sum(np.asarray(jax.grad(lambda y: sines(y, None))(x @ w)) * (x @ dw), -1)
    each = each.sum(1) if row_axes == 1 else each
    want = np.square(each).sum() / 2 / (3 * M)
    np.testing.assert_allclose(found.rows[0].scores[0], want, rtol=0.02)


@pytest.mark.slow
def test_batches_add_up_and_parameters_are_scored_together():
    params, batches = parameters(), [normal(M, K, seed=s) for s in range(3)]

    def scores(batches):
        found = jq.allocate(two_layers, params, batches, FEW, 9.0, loss=sines)
        return np.array([row.scores for row in found.rows])

    each = [scores([x]) for x in batches]
    np.testing.assert_allclose(scores(batches), np.mean(each, 0), rtol=1e-5)
    one = jq.allocate(two_layers, params, batches, FEW, 9.0, loss=sines, rules=jq.Rule("b", W4))
    np.testing.assert_allclose(one.rows[0].scores, scores(batches)[1], rtol=1e-5)


@pytest.mark.slow
def test_scores_of_sampled_tokens_are_divergences():
    params, x = {"w": 2 * normal(K, N)}, 2 * normal(64, K, seed=1)

    def apply(params, x):
        return x @ params["w"]

    found = jq.allocate(apply, params, [x] * 40, FEW, 9.0)
    before = jax.nn.log_softmax(apply(params, x))
    for config, score in zip(FEW.values(), found.rows[0].scores, strict=True):
        after = jax.nn.log_softmax(apply(jq.tree.dequantize(jq.tree.quantize(params, config)), x))
        divergence = jnp.mean(jnp.sum(jnp.exp(before) * (before - after), -1))
        np.testing.assert_allclose(score, divergence, rtol=0.15)


def test_scores_of_random_projections_are_squared_changes():
    params, x = {"w": normal(K, N)}, normal(64, K, seed=1)

    def apply(params, x):
        return {"y": x @ params["w"], "ids": jnp.arange(3)}

    found = jq.allocate(apply, params, [x] * 20, FEW, 9.0, loss=random_projection)
    for config, score in zip(FEW.values(), found.rows[0].scores, strict=True):
        q = jq.tree.dequantize(jq.tree.quantize(params, config))
        change = jnp.sum(jnp.square(apply(q, x)["y"] - apply(params, x)["y"]), -1) / 2
        np.testing.assert_allclose(score, change.mean(), rtol=0.1)


def layers(count=6):
    """Layers of very different influence on the result."""
    params = {f"layer{i}": normal(K, K, seed=i) * (0.02 * 2**i) for i in range(count)}
    return params | {"head": normal(K, N, seed=9)}


def residual(params, x):
    for i in range(len(params) - 1):
        x = x + jnp.tanh(x @ params[f"layer{i}"])
    return 3 * x @ params["head"]


def divergence(params, rules, x):
    q = jq.tree.dequantize(jq.tree.quantize(params, rules))
    before, after = (jax.nn.log_softmax(residual(p, x)) for p in (params, q))
    return float(jnp.mean(jnp.sum(jnp.exp(before) * (before - after), -1)))


@pytest.mark.slow
def test_a_mixture_is_better_than_one_option_and_within_the_budget():
    params, x = layers(), normal(128, K, seed=50)
    config = dataclasses.replace(W4, scale_dtype="float16")
    options = {
        f"{b} bits": dataclasses.replace(config, format=f, symmetric=False)
        for b, f in ((2, jq.INT2), (4, jq.INT4), (8, jq.INT8))
    }
    uniform = jq.tree.default_rules(options["4 bits"])
    size = sum(stored_bits(q) for q in leaves_of(jq.tree.quantize(params, uniform)))
    total = sum(w.size for w in params.values())
    found = jq.allocate(residual, params, [x] * 4, options, size / total)
    assert found.bits_per_weight <= size / total
    q = jq.tree.quantize(params, found.rules)
    real = sum(stored_bits(leaf) for leaf in leaves_of(q))
    np.testing.assert_allclose(real / total, found.bits_per_weight, rtol=1e-12)
    assert len({row.option for row in found.rows}) > 1
    test = normal(128, K, seed=51)
    real = divergence(params, found.rules, test)
    assert real < 0.85 * divergence(params, uniform, test)
    np.testing.assert_allclose(found.score, real, rtol=0.3)
    assert found.score < found.uniform()["4 bits"][1]
    # More bits, less loss; each within its budget.
    bits, scores = found.curve()
    assert np.all(np.diff(bits) >= 0)
    assert np.all(np.diff(scores) <= 1e-9)
    assert found.within(7.0).bits_per_weight <= 7.0


def leaves_of(q):
    return jax.tree.leaves(q, is_leaf=jq.tree.is_quantized)


def test_options_without_a_method_are_rounded_beside_others():
    params, x = parameters(), normal(200, K, seed=3)
    gptq, rules = jq.methods.GPTQ(), [jq.Rule("a", W4)]
    statistics = jq.collect(two_layers, params, [x], W4, gptq)
    options = {"gptq": (W4, gptq), "8 bits": jq.W8A16}
    for budget in (6.0, 12.0):
        found = jq.allocate(
            two_layers, params, [x], options, budget, loss=sines, statistics=statistics, rules=rules
        )
        assert np.all(np.isfinite(found.rows[0].scores))
        assert found.rows[0].option == ("gptq" if budget < 8 else "8 bits")
        q = jq.tree.quantize(params, found.rules, statistics=statistics)["a"]
        if budget > 8:
            np.testing.assert_array_equal(q.codes, jq.tree.quantize(params, jq.W8A16)["a"].codes)


def test_statistics_need_an_option_with_a_method():
    options, statistics = {"w4": W4, "8 bits": jq.W8A16}, {"a": {}}
    words = "statistics must go with a method; got the options w4, 8 bits without one. Pass an opt"
    with pytest.raises(ValueError, match=words):
        jq.allocate(two_layers, parameters(), [normal(8, K)], options, 9.0, statistics=statistics)


@pytest.mark.slow
def test_options_may_have_methods_and_what_changes_activations_is_undone():
    params, x = parameters(), normal(200, K, seed=3)
    options = {
        "gptq": (W4, jq.methods.GPTQ()),
        "rotated": (W4, [jq.methods.SINQ(), jq.methods.Rotation(8)]),
        "8 bits": jq.W8A16,
    }
    kinds = [jq.methods.GPTQ(), jq.methods.SecondMoment]
    statistics = jq.collect(two_layers, params, [x], W4, kinds)
    rules = [jq.Rule("a", W4)]
    found = jq.allocate(
        two_layers, params, [x], options, 9.0, loss=sines, statistics=statistics, rules=rules
    )
    q = jq.tree.quantize(params, found.within(9.0).rules or found.rules, statistics=statistics)
    assert jq.tree.is_quantized(q["a"])
    assert found.rows[0].bits[1] > found.rows[0].bits[0]  # Multipliers and signs count.
    scores = dict(zip(options, found.rows[0].scores, strict=True))
    nearest = jq.allocate(two_layers, params, [x], {"w4": W4}, 9.0, loss=sines, rules=rules)
    assert scores["8 bits"] < scores["gptq"]
    assert 0.2 < scores["rotated"] / nearest.rows[0].scores[0] < 2


@pytest.mark.slow
def test_parameters_together_share_an_option():
    params, x = layers(), normal(64, K, seed=50)
    pattern = "re:layer[0-9]"
    found = jq.allocate(residual, params, [x], OPTIONS, 6.5, together=[pattern])
    assert len({row.option for row in found.rows if row.path != "head"}) == 1
    # One group for each text that the wildcards match.
    pairs = jq.allocate(residual, params, [x], OPTIONS, 6.5, together=["re:layer([01]|[2-5])"])
    assert len(pairs.groups) == 7
    apart = jq.allocate(residual, params, [x], OPTIONS, 6.5)
    assert apart.score <= found.score


@pytest.mark.slow
def test_options_that_do_not_fit_are_left_out():
    params = {"a": normal(40, 32), "b": normal(32, 40, seed=1)}
    options: dict[str, Any] = {"g16": W4, "g8": dataclasses.replace(W4, group_size=8)}
    x = normal(M, 40, seed=2)
    found = jq.allocate(two_layers, params, [x], options, 9.0, loss=sines)
    assert found.rows[0].bits[0] == found.rows[0].scores[0] == np.inf
    assert found.rows[0].option == "g8"
    assert np.isfinite(found.rows[1].bits).all()
    assert "g16" not in found.uniform()
    with pytest.raises(ValueError, match=r"^No option fits a parameter: a: group_size must .* Add"):
        jq.allocate(two_layers, params, [x], {"g16": W4}, 9.0, loss=sines)


@pytest.mark.slow
def test_sizes_count_what_is_stored_or_what_dense_files_take():
    int3 = jq.FILE_FORMATS["int3"]
    params, x = parameters(), normal(M, K)
    options = {"3 bits": jq.ArrayConfig(format=int3, group_size=None), "4 bits": FEW["4 bits"]}
    stored, dense = (
        jq.allocate(two_layers, params, [x], options, 9.0, loss=sines, size=size).rows[0].bits
        for size in (stored_bits, dense_bits)
    )
    scales = 32 * N
    assert stored == (4 * K * N + scales,) * 2
    assert dense == (3 * K * N + scales, 4 * K * N + scales)
    for format in (jq.NF4, jq.INT8, jq.FP8_E4M3, jq.MXFP4):
        q = jq.quantize(normal(64, 64), jq.ArrayConfig(format=format))
        assert dense_bits(q) == stored_bits(q)


def test_symmetric_int2_is_offered_with_a_warning():
    options = FEW | {"2 bits": jq.ArrayConfig(format=jq.INT2)}
    with pytest.warns(UserWarning, match="'2 bits' is symmetric INT2, which has only three levels"):
        jq.allocate(two_layers, parameters(), [normal(M, K)], options, 9.0, loss=sines)


def lookups(params, tokens):
    return jnp.tanh(params["a"][tokens]) @ params["b"]


def reshaped(params, x):
    return jnp.tanh(x @ params["a"].reshape(K, N)) @ params["b"]


def convolved(params, x):
    return jax.lax.conv(x[None, None], params["a"][None, None], (1, 1), "VALID")[0, 0]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    ("apply", "x", "change", "text"),
    [
        (two_layers, None, {"options": {}}, "options must not be empty; got {}"),
        (two_layers, None, {"options": {"x": "W4"}}, "or a pair of one and a method; got 'W4' for"),
        (two_layers, None, {"bits_per_weight": 3}, "bits_per_weight=3 is too few: the budget must"),
        (two_layers, None, {"batches": []}, "batches must have at least one row of outputs; got 0"),
        (two_layers, None, {"rules": [jq.Rule("*", None)]}, "the rules select no leaf"),
        (two_layers, np.full((M, K), np.nan, np.float32), {}, "a: scores must be finite; got"),
        (lookups, np.arange(4), {}, "a met no product of activations in any batch"),
        (two_layers, None, {"row_axes": 0}, "row_axes must be a positive int or None; got 0"),
        (two_layers, None, {"together": "c"}, "'c' matches no leaf"),
    ],
)
def test_what_cannot_be_allocated_is_an_error(apply, x, change, text):
    x = normal(M, K) if x is None else x
    arguments: dict[str, Any] = {"batches": [x], "options": FEW, "bits_per_weight": 9.0}
    with pytest.raises(ValueError, match=text):
        jq.allocate(apply, parameters(), **arguments | change, loss=sines)


@pytest.mark.slow
def test_parameters_in_other_forms_are_errors():
    params = {"a": normal(2, K // 2, N), "b": normal(N, 40)}
    rules = jq.Rule("a", FEW["4 bits"])
    with pytest.raises(ValueError, match=r"^a: only the errors of whole parameters.*Leave it out"):
        jq.allocate(reshaped, params, [normal(M, K)], FEW, 9.0, loss=sines, rules=rules)
    params, rules = {"a": normal(K, K)}, jq.Rule("a", FEW["4 bits"], axis=-1)
    with pytest.raises(ValueError, match=r"^a: only the errors of whole .* contract axes \(1,\)"):
        jq.allocate(
            lambda params, x: x @ params["a"], params, [normal(M, K)], FEW, 9.0, rules=rules
        )
    params = {"a": normal(3, 3)}
    rules = jq.Rule("a", FEW["4 bits"], axis=(0, 1))
    with pytest.raises(ValueError, match=r"^a: only the errors of whole parameters"):
        jq.allocate(convolved, params, [normal(8, 8)], FEW, 9.0, loss=sines, rules=rules)


@pytest.mark.parametrize("outputs", [jnp.ones((3, 1)), jnp.arange(4), (jnp.ones((2, 2)),)])
def test_losses_say_which_outputs_they_need(outputs):
    with pytest.raises(ValueError, match="sampled_token needs logits"):
        jq.allocation.sampled_token(outputs, jax.random.key(0))
    with pytest.raises(ValueError, match="random_projection needs floating-point outputs"):
        random_projection({"ids": jnp.arange(3)}, jax.random.key(0))


@pytest.mark.slow
def test_tables_and_pictures_have_each_parameter(tmp_path, monkeypatch):
    found = jq.allocate(residual, layers(), [normal(M, K)], OPTIONS, 6.5)
    text = str(found)
    for row in found.rows:
        assert row.path in text
    assert f"{found.bits_per_weight:.3f}" in text
    assert repr(found) == f"Allocation(7 parameters, {found.bits_per_weight:.3f} bits)"
    image = pytest.importorskip("matplotlib.image", reason="pictures need jaxquant[plot]")
    # Matplotlib warns if its search for the best place of a legend takes a second.
    monkeypatch.delattr("matplotlib.legend.Legend._find_best_position")
    found.plot(str(tmp_path / "a.png"))
    pixels = image.imread(tmp_path / "a.png")
    is_ink = (pixels[..., :3] < 0.5).any(-1)
    assert all(0.003 < part.mean() < 0.8 for part in np.array_split(is_ink, 3, axis=1))
    found.plot(str(tmp_path / "a.svg"))
    drawn = (tmp_path / "a.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("layer3", "8 bits for all", "chosen"))
