import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import (
    FP8,
    INT4,
    INT8,
    MXFP4A16,
    W4A16,
    W8A8,
    W8A16,
    ArrayConfig,
    Rule,
    Scheme,
    quantize,
    take,
    tree,
)
from jaxquant.tree.internal import is_matrix
from jaxquant.tree.rules import bits_per_weight

from .trees import leaves_of, normal, parameters


@pytest.mark.parametrize(
    "pattern, path, is_match",
    [
        ("layers/0/kernel", "layers/0/kernel", True),
        ("layers/0/kernel", "layers/0/kernel_2", False),
        ("layers/0/kernel", "model/layers/0/kernel", False),
        ("*/kernel", "a/b/c/kernel", True),
        ("*/kernel", "kernel", False),
        ("*kernel", "kernel", True),
        ("layers/?/kernel", "layers/7/kernel", True),
        ("layers/?/kernel", "layers/17/kernel", False),
        ("layers/[12]/*", "layers/2/bias", True),
        ("layers/[12]/*", "layers/3/bias", False),
        ("Kernel", "kernel", False),
        ("a.b", "a_b", False),
        (r"re:layers/\d+/kernel", "layers/17/kernel", True),
        (r"re:layers/\d+", "layers/17/kernel", False),
        (r"re:\d+/kernel", "layers/17/kernel", False),
        ("re:a|b", "b", True),
        ("re:(?i)KERNEL", "kernel", True),
        ("", "", True),
        ("*", "", True),
    ],
)
def test_a_pattern_matches_the_whole_path(pattern, path, is_match):
    assert Rule(pattern, W8A8).matches(path, normal(2, 3)) is is_match


def test_where_narrows_a_pattern():
    rule = Rule("*", W8A8, where=lambda path, leaf: leaf.shape[0] > 4 and path != "c")
    assert [rule.matches(p, normal(n, 2)) for p, n in [("a", 8), ("b", 4), ("c", 8)]] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "path, leaf, wanted",
    [
        ("kernel", np.ones((2, 3), np.float32), True),
        ("kernel", jnp.ones((2, 3, 4), jnp.bfloat16), True),
        ("kernel", np.ones(3, np.float32), False),
        ("kernel", np.ones((2, 3), np.int32), False),
        ("kernel", 3.0, False),
        ("kernel", None, False),
    ],
)
def test_matrices_are_floating_point_with_two_or_more_axes(path, leaf, wanted):
    assert bool(is_matrix(path, leaf)) is wanted


MATRIX, EMBEDDING, LEFT = -2, -1, None


@pytest.mark.some_rows(6)
@pytest.mark.parametrize(
    "path, shape, axis",
    [
        ("dense/kernel", (64, 32), MATRIX),
        ("layers/up/kernel", (2, 64, 32), MATRIX),
        ("model.layers.0.mlp.gate_proj.weight", (64, 32), MATRIX),
        ("attention/query", (64, 4, 32), MATRIX),
        ("lm_head", (64, 32), MATRIX),
        ("normal_proj/kernel", (64, 32), MATRIX),
        ("multi_scale/kernel", (64, 32), MATRIX),
        ("linear/kernel", (64, 32), MATRIX),
        ("patch_embedding/kernel", (64, 32), MATRIX),
        ("embed/table", (64, 32), EMBEDDING),
        ("Embedding_0/weight", (64, 32), EMBEDDING),
        ("transformer.wte.weight", (64, 32), EMBEDDING),
        ("transformer.wpe.weight", (64, 32), EMBEDDING),
        ("dense/bias", (32,), LEFT),
        ("layers/dense/bias", (2, 32), LEFT),
        ("layers.0.q_proj.bias", (2, 32), LEFT),
        ("lstm.bias_ih_l0", (2, 32), LEFT),
        ("layers/norm/scale", (2, 32), LEFT),
        ("layers/LayerNorm_0/weight", (2, 32), LEFT),
        ("layer_normalization/gamma", (2, 32), LEFT),
        ("layer_normalization/beta", (2, 32), LEFT),
        ("transformer.h.0.ln_1.weight", (2, 32), LEFT),
        ("input_layernorm.weight", (2, 32), LEFT),
        ("embeddings/norm/scale", (2, 32), LEFT),
        ("transformer.ln_f.weight", (2, 32), LEFT),
        ("h/ln1/weight", (2, 32), LEFT),
        ("attention_bias", (2, 32), LEFT),
        ("temperature", (), LEFT),
        ("vector", (64,), LEFT),
    ],
)
def test_default_rules_select_matrices_and_embeddings_but_not_norms_and_biases(path, shape, axis):
    params = {path: normal(*shape), "other": normal(64, 32)}
    rows = {r.path: r for r in tree.report(None, tree.quantize(params, W8A16)).rows}
    assert (rows[path].scheme is None) == (axis is LEFT)
    if axis is not LEFT:
        q = tree.quantize(params, W8A16)[path]
        wanted = list(shape)
        wanted[axis] = 1
        assert [q.scale.shape[a] for a in q.stored_axes(range(q.ndim))] == wanted


def test_the_axis_of_default_rules_applies_to_matrices_but_not_embeddings():
    params = {"kernel": normal(64, 32), "embed": normal(48, 64)}
    q = tree.quantize(params, tree.default_rules(W8A8, axis=-1))
    assert q["kernel"].scale.shape == (64, 1)
    assert q["embed"].scale.shape == (48, 1)


def test_default_rules_apply_block_shapes_to_embeddings():
    rules = tree.default_rules(ArrayConfig(group_size=(16, 32)), axis=(0, 1))
    table = normal(48, 64)
    q = tree.quantize({"embed": table, "kernel": normal(64, 32)}, rules)
    assert q["embed"].scale.shape == (3, 2)
    rows = np.array([3, 40])
    np.testing.assert_array_equal(
        take(q["embed"], rows, axis=0), np.asarray(q["embed"].dequantize())[rows]
    )


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    "config, bits",
    [
        (ArrayConfig(format=INT4, group_size=16), 4 + 32 / 16),
        (ArrayConfig(format=INT4, group_size=16, symmetric=False), 4 + (32 + 4) / 16),
        (ArrayConfig(symmetric=False, scale_dtype="bfloat16"), 8 + (16 + 8) / 64),
        (ArrayConfig(per_tensor=True), 8 + 32 / (64 * 32)),
    ],
)
def test_bits_per_weight_count_codes_scales_and_zero_points(config, bits):
    assert bits_per_weight((64, 32), config, axis=0) == bits
    q = quantize(normal(64, 32), config, axis=0)
    assert 8 * q.nbytes / q.size == bits


def test_the_first_matching_rule_applies():
    rules = [Rule("out/0", None), Rule("out/*", W8A8, where=is_matrix), Rule("*kernel", W8A16)]
    rules.append(Rule("*", W4A16, where=lambda path, leaf: path.startswith("embed"), axis=-1))
    params = parameters()
    params["out"].append(jnp.asarray(normal(64, 8)))
    q = leaves_of(tree.quantize(params, [*rules[:3], dataclasses.replace(rules[3], group_size=64)]))
    assert q["out/0"] is params["out"][0]
    assert q["out/2"].inputs.config == W8A8.inputs
    assert q["layers/up/kernel"].inputs is None
    assert q["layers/up/kernel"].format.name == "int8"
    assert q["embed/table"].format is INT4
    assert q["steps"] is params["steps"]


@pytest.mark.parametrize(
    "rule, axis, group_size, inputs",
    [
        (Rule("*", W8A8), -2, None, W8A8.inputs),
        (Rule("*", W8A8, axis=-1), -1, None, W8A8.inputs),
        (Rule("*", W8A8, axis=0, group_size=16), 0, 16, W8A8.inputs),
        (Rule("*", W4A16), -2, 128, None),
        (Rule("*", W4A16, group_size=32), -2, 32, None),
        (Rule("*", ArrayConfig(), axis=1, group_size=8), 1, 8, None),
        (Rule("*", ArrayConfig(), axis=(0, 1), group_size=(4, 8)), (0, 1), (4, 8), None),
    ],
)
def test_a_plan_has_the_axis_and_the_group_size_of_its_rule(rule, axis, group_size, inputs):
    scheme = rule.scheme if isinstance(rule.scheme, Scheme) else Scheme(rule.scheme)
    weights = dataclasses.replace(scheme.weights, group_size=group_size)
    assert rule.resolve() == Scheme(weights, inputs)
    assert rule.plan() == (Scheme(weights, inputs), axis, None, None)


def test_a_rule_without_a_scheme_resolves_to_none():
    assert Rule("*", None, axis=3).resolve() is None
    assert Rule("*", None, axis=3).plan() is None


FORMS = {
    "dict": {"out/0": W8A8, "*/kernel": W4A16},
    "pairs": [("out/0", W8A8), ("*/kernel", W4A16)],
    "rules": (Rule("out/0", W8A8), Rule("*/kernel", W4A16, group_size=64)),
    "both": iter([Rule("out/0", W8A8), ("*/kernel", W8A16)]),
}


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("rules", [*FORMS.values()], ids=[*FORMS])
def test_rules_may_be_a_dict_pairs_or_rules(rules):
    params = parameters()
    params["layers"]["up"]["kernel"] = jnp.asarray(normal(2, 128, 128))
    q = leaves_of(tree.quantize(params, rules))
    quantized = {path for path, leaf in q.items() if leaf is not leaves_of(params)[path]}
    assert quantized == {"out/0", "layers/up/kernel"}
    assert q["out/0"].format.name == "int8"


def test_a_single_rule_needs_no_sequence():
    params = parameters()
    q = leaves_of(tree.quantize(params, Rule("out/0", W8A8)))
    assert {k for k, leaf in q.items() if leaf is not leaves_of(params)[k]} == {"out/0"}


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("scheme", [W8A8, FP8, W8A8.weights], ids=["W8A8", "FP8", "config"])
def test_a_single_scheme_or_config_means_the_default_rules(scheme):
    q = leaves_of(tree.quantize(parameters(), scheme))
    named = leaves_of(tree.quantize(parameters(), tree.default_rules(scheme)))
    quantized = {path for path, leaf in q.items() if hasattr(leaf, "codes")}
    assert quantized == {"embed/table", "layers/up/kernel", "out/0"}
    for path in quantized:
        np.testing.assert_array_equal(q[path].codes, named[path].codes)


@pytest.mark.parametrize(
    "build, text",
    [
        (
            lambda: Rule("*", "W8A8"),  # pyright: ignore[reportArgumentType] (the error)
            r"A rule's scheme must be .* or None; got 'W8A8'; write jaxquant.SCHEMES\['W8A8'\]",
        ),
        (
            lambda: tree.quantize(parameters(), {"*": "W4A16"}),
            r"A rule's scheme must be .* or None; got 'W4A16'; write jaxquant.SCHEMES\['W4A16'\]",
        ),
        (
            lambda: Rule("*", "W3"),  # pyright: ignore[reportArgumentType] (the error)
            r"A rule's scheme must be .* or None; got 'W3'\.$",
        ),
        (
            lambda: Rule("*", ["W8A8"]),  # pyright: ignore[reportArgumentType] (the error)
            r"A rule's scheme must be .* or None; got \['W8A8'\]\.$",
        ),
        (
            lambda: Rule(3, W8A8),  # pyright: ignore[reportArgumentType] (the error)
            r"A rule's pattern must be a str; got 3. Write Rule\(",
        ),
        (
            lambda: Rule("re:(", W8A8),
            r"must be a glob, or 're:' and a regular expression; got 're:\(': missing \)",
        ),
        (
            lambda: Rule("out/*", MXFP4A16, group_size=128),
            r"Rule 'out/\*': mxfp4 has a fixed group size of 32; got group_size=128. Leave it",
        ),
        (
            lambda: Rule("out/*", W8A8, group_size=0),
            r"Rule 'out/\*': group_size must be a positive int, .* got 0",
        ),
        (
            lambda: tree.quantize(parameters(), "W8A8"),
            "rules must be a Scheme, .* or a sequence of Rule; got 'W8A8'; write jaxquant.SCHEMES",
        ),
        (
            lambda: tree.quantize(parameters(), INT8),  # pyright: ignore[reportArgumentType] (same)
            r"got int8, a format; write jaxquant.ArrayConfig\(format=...\) with it",
        ),
        (
            lambda: tree.quantize(parameters(), 8),  # pyright: ignore[reportArgumentType] (same)
            "rules must be a Scheme, an ArrayConfig, a Rule, a .* or a sequence of Rule; got 8",
        ),
        (
            lambda: tree.quantize(parameters(), {}),
            r"rules must not be empty; got \{\}. Pass a Scheme",
        ),
        (
            lambda: tree.quantize(parameters(), []),
            r"rules must not be empty; got \[\]. Pass a Scheme",
        ),
        (
            lambda: tree.quantize(parameters(), ["*/kernel"]),
            r"Each rule must be a Rule or a pair .* got '\*/kernel'. Write Rule\(",
        ),
        (
            lambda: tree.quantize(parameters(), {3: W8A8}),  # pyright: ignore[reportArgumentType]
            r"Each rule must be a Rule or a pair \(pattern, scheme\); got \(3, ",
        ),
        (
            lambda: tree.quantize(parameters(), [("*/kernel", W8A8, -2)]),
            r"Each rule must be a Rule or a pair \(pattern, scheme\); got \('\*/kernel', ",
        ),
    ],
)
def test_invalid_rules_raise(build, text):
    with pytest.raises(ValueError, match=text):
        build()
