"""`uses`: the axes that a function contracts, and the rules that follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq

X = jnp.ones((2, 8))


def contracted(fn, w, *args):
    return jq.uses(lambda p, *args: fn(p["w"], *args), {"w": w}, *args).contracted.get("w")


def scanned(w, x):
    return lax.scan(lambda x, layer: (x @ layer, None), x, w)[0]


def scanned_outside(w, x):
    """The layers' axis is the second."""
    return scanned(jnp.moveaxis(w, 1, 0), x)


def patches(w):
    numbers = ("NHWC", "HWIO", "NHWC")
    image = jnp.ones((1, 16, 16, 3))
    return lax.conv_general_dilated(image, w, (8, 8), "VALID", dimension_numbers=numbers)


def convolved(layout):
    numbers = ("NHC", layout, "NHC")
    return lambda w: lax.conv_general_dilated(
        jnp.ones((1, 9, 8)), w, (1,), "SAME", dimension_numbers=numbers
    )


def depthwise(w):
    """The kernel gets an axis for the channels of a group, of which there is one."""
    image, numbers = jnp.ones((1, 8, 9)), ("NCH", "OIH", "NCH")
    return lax.conv_general_dilated(
        image, w[:, None], (1,), "SAME", dimension_numbers=numbers, feature_group_count=8
    )


AXES = {
    "matrix": (lambda w: X @ w, (8, 4), (0,)),
    "transposed matrix": (lambda w: X @ w.T, (4, 8), (1,)),
    "kernel of attention": (lambda w: jnp.einsum("bd,dhk->bhk", X, w), (8, 2, 4), (0,)),
    "output of attention": (
        lambda w: jnp.einsum("hbk,hkd->bd", jnp.ones((2, 3, 4)), w),
        (2, 4, 8),
        (0, 1),
    ),
    "matrix as three axes": (
        lambda w: jnp.einsum("hbk,hkd->bd", jnp.ones((2, 3, 4)), w.reshape(2, 4, 8)),
        (8, 8),
        (0,),
    ),
    "part of a fused matrix": (
        lambda w: jnp.split(X @ w.reshape(8, 3, 4)[:, 1], 2)[0],
        (8, 12),
        (0,),
    ),
    "half of the rows": (lambda w: X @ w[8:], (16, 4), (0,)),
    "experts": (lambda w: jnp.einsum("ebd,edf->ebf", jnp.ones((3, 2, 8)), w), (3, 8, 4), (1,)),
    "ragged experts": (lambda w: lax.ragged_dot(X, w, jnp.array([1, 0, 1])), (3, 8, 4), (1,)),
    "stacked layers": (lambda w: scanned(w, X), (3, 8, 8), (1,)),
    "stacked along the second axis": (lambda w: scanned_outside(w, X), (8, 3, 8), (0,)),
    "unstacked layers": (lambda w: X @ list(w)[1], (3, 8, 4), (1,)),
    "convolution HIO": (convolved("HIO"), (3, 8, 4), (0, 1)),
    "convolution OIH": (convolved("OIH"), (4, 8, 3), (1, 2)),
    "depthwise convolution": (depthwise, (8, 3), (1,)),
    "loop over one layer": (lambda w: scanned(w[None], X), (8, 8), (0,)),
    "table": (lambda w: w[jnp.array([1, 2])], (9, 8), (1,)),
    "tied table": (lambda w: w[jnp.array([1, 2])] @ w.T, (9, 8), (1,)),
    "scaled matrix": (lambda w: X @ (w * jnp.linspace(0, 1, 4)[None]), (8, 4), (0,)),
    "inside of programs": (
        jax.jit(jax.checkpoint(lambda w: lax.cond(X[0, 0] > 0, jnp.dot, jnp.dot, X, w))),
        (8, 4),
        (0,),
    ),
    "added": (lambda w: X + w, (2, 8), None),
    "gain of a norm": (lambda w: (X * w[None]) @ jnp.ones((8, 8)), (8,), None),
    "gain with an axis of length 1": (lambda w: (X * w) @ jnp.ones((8, 8)), (1, 8), None),
    "result not used": (lambda w: (X @ w, X)[1], (8, 4), None),
    "not used": (lambda w: X, (8, 4), None),
}


@pytest.mark.parametrize("name", AXES)
def test_the_axes_that_are_summed_over_are_found(name):
    fn, shape, axes = AXES[name]
    assert contracted(fn, jax.ShapeDtypeStruct(shape, jnp.float32)) == axes


def generated(w):
    """Each token is the best one after the last one."""

    def step(carry):
        i, token, last = carry
        row = jnp.tanh(w[token])
        return i + 1, jnp.argmax(row), last + row

    return lax.while_loop(lambda carry: carry[0] < 3, step, (0, 0, jnp.zeros(8)))[2]


def by_layer(w, n):
    return lax.fori_loop(0, n, lambda i, x: jnp.tanh(x + w[i]), jnp.zeros(8))


ROWS = {
    "argument": (lambda w, n: w[n] + 1.0, (1,)),
    "part of an argument": (lambda w, n: jnp.tanh(lax.dynamic_slice_in_dim(w, n + 2, 1)), (1,)),
    "column": (lambda w, n: jnp.tanh(w[:, n]), (0,)),
    "token": (lambda w, n: generated(w), (1,)),
    "branch": (lambda w, n: jnp.tanh(w[lax.cond(n > 0, lambda: 1, lambda: 2)]), (1,)),
    "token in a branch": (lambda w, n: lax.cond(n > 0, generated, generated, w), (1,)),
    "counter": (lambda w, n: by_layer(w, 3), None),
    "counter up to an argument": (by_layer, None),
    "counted": (
        lambda w, n: lax.scan(lambda x, i: (x + w[i], None), w[0], jnp.arange(3))[0],
        None,
    ),
    "two rows": (lambda w, n: jnp.tanh(lax.dynamic_slice_in_dim(w, n, 2)), None),
    "matrix of a stack": (lambda w, n: jnp.tanh(w.reshape(3, 3, 8)[n]), None),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_looked_up_where_its_index_depends_on_an_argument(name):
    fn, axes = ROWS[name]
    assert contracted(fn, jnp.ones((9, 8)), jnp.int32(3)) == axes


def test_convolutions_have_windows_and_groups():
    numbers = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))

    def apply(w, x):
        return lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=2
        )

    found = jq.uses(apply, jnp.ones((1, 3, 2, 8)), jnp.ones((1, 5, 5, 4)))
    (use,) = found.by_path[""]
    assert (use.contracted, use.window, use.groups) == ((0, 1, 2), (0, 1), 2)


def test_uses_say_what_each_parameter_is_for():
    def apply(params, tokens):
        x = params["embed"][tokens] + params["bias"][None]
        return scanned(params["layers"], x) @ params["embed"].T

    params = {"embed": jnp.ones((9, 8)), "bias": jnp.ones(8), "layers": jnp.ones((3, 8, 8))}
    found = jq.uses(apply, params, jnp.array([1, 2]))

    lookup, product = found.by_path["embed"]
    assert (lookup.kind, lookup.looked_up) == ("lookup", (0,))
    assert (product.kind, product.contracted) == ("product", (1,))
    (layer,) = found.by_path["layers"]
    assert (layer.stacked, layer.contracted) == ((0,), (1,))
    assert layer.line.split("/")[-1].startswith("test_uses.py:")
    assert list(found) == ["bias", "embed", "layers"]
    assert "contracted 1; stacked 0" in str(found)


def test_parameters_with_the_same_activations_are_named():
    def apply(params, x):
        q, k, v = (x.astype(jnp.bfloat16) @ params[n].astype(jnp.bfloat16) for n in "qkv")
        return (q + k + v) @ params["out"].astype(jnp.bfloat16)

    params = {n: jnp.ones((8, 8)) for n in ("q", "k", "v", "out")}
    assert jq.uses(apply, params, X).shared_activations() == [("k", "q", "v")]


GROUPS = {
    "one axis": (32, (64, 4), lambda w: jnp.ones((2, 64)) @ w, (2, 4)),
    "over two axes": (
        32,
        (12, 16, 8),
        lambda w: jnp.einsum("hk,hkd->d", jnp.ones((12, 16)), w),
        (6, 1, 8),
    ),
    "within the second": (
        8,
        (3, 16, 4),
        lambda w: jnp.einsum("hk,hkd->d", jnp.ones((3, 16)), w),
        (3, 2, 4),
    ),
    "channels of a kernel": (8, (4, 8, 3), convolved("OIH"), (4, 1, 3)),
    "boxes of pixels": (32, (8, 8, 3, 4), patches, (2, 1, 3, 4)),
    "boxes over channels": (16, (6, 8, 6), convolved("HIO"), (3, 1, 6)),
}


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", GROUPS)
def test_groups_lie_along_contracted_axes(name):
    size, shape, fn, counts = GROUPS[name]
    params = {"w": jnp.ones(shape)}
    rules = jq.uses(lambda p: fn(p["w"]), params).rules(
        jq.ArrayConfig(format=jq.INT4, group_size=size)
    )
    q = jq.tree.quantize(params, rules)["w"]
    stored = q.stored_axes(range(q.ndim))
    assert tuple(q.scale.shape[a] for a in stored) == counts
    # Nothing on the way to the product needs other groups.
    jax.eval_shape(jq.lift(fn, strict=True), q)


def test_kernels_of_attention_are_stored_as_matrices():
    """Where nothing else uses them, and the function does not join their axes first."""
    shapes = {"query": (40, 3, 16), "out": (3, 16, 40), "joined": (3, 16, 40), "kernel": (4, 16, 8)}
    shapes["summed"] = (3, 16, 40)
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}

    def apply(params, x):
        heads = jnp.einsum("btd,dnh->btnh", x, params["query"])
        y = jnp.einsum("btnh,nhd->btd", heads, params["out"])
        y += heads.reshape(2, 5, -1) @ params["joined"].reshape(-1, 40)
        y += jnp.einsum("btnh,nhd->btd", heads, params["summed"])
        y += heads[..., 0] @ params["summed"][:, 0]
        x = jax.lax.conv_general_dilated(
            heads[..., 0, :],
            params["kernel"],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return y.sum() + x.sum()

    x = jnp.ones((2, 5, 40))
    for scheme in (jq.W8A8, jq.ArrayConfig(format=jq.INT4, group_size=8)):
        rules = dict(zip(sorted(params), jq.uses(apply, params, x).rules(scheme), strict=True))
        found = {name: rule.contracted for name, rule in rules.items()}
        assert found == {**dict.fromkeys(params), "out": (0, 1)}
        q = jq.tree.quantize(params, list(rules.values()), platform="cpu")
        assert {name: q[name].order for name in ("query", "out")} == {
            "query": (-2, -1, -3),
            "out": (-1, -3, -2),
        }


def test_kernels_of_one_pixel_are_stored_as_matrices():
    params = {"pixel": jnp.ones((1, 1, 6, 8)), "window": jnp.ones((1, 2, 6, 8))}

    def apply(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        convolved = [
            jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)
            for w in params.values()
        ]
        return sum(convolved)

    rules = jq.uses(apply, params, jnp.ones((2, 5, 5, 6))).rules(jq.W8A8)
    assert [rule.contracted for rule in rules] == [(0, 1, 2), None]


def test_a_convolution_with_boxes_equals_that_of_the_dequantized_kernel():
    kernel = jnp.sin(jnp.arange(768.0)).reshape(8, 8, 3, 4)
    rules = jq.uses(patches, kernel).rules(jq.ArrayConfig(format=jq.INT4, group_size=32))
    q = jq.tree.quantize(kernel, rules)
    np.testing.assert_allclose(jq.lift(patches)(q), patches(q.dequantize()), rtol=1e-5, atol=1e-5)


def test_axes_that_are_joined_before_the_product_have_groups_of_neighbours_only():
    shapes = {"box": (8, 8, 3, 4), "middle": (2, 32, 3, 4), "whole": (3, 32, 4)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}

    def apply(params):
        return sum(jnp.ones((1, w[..., 0].size)) @ w.reshape(-1, 4) for w in params.values())

    with pytest.warns(UserWarning, match=r"in float: groups of 32 do not .* \(box\); .* \("):
        rules = jq.uses(apply, params).rules(jq.ArrayConfig(format=jq.INT4, group_size=32))
    q = jq.tree.quantize(params, rules)
    assert [jq.tree.is_quantized(q[name]) for name in shapes] == [False, False, True]
    assert not jq.explain(jq.lift(apply), q).dequantized
    assert rules[0].note == "groups of 32 do not fit 8 x 8 x 3 contracted elements"


def test_of_parameters_that_no_group_fits_a_warning_and_a_report_tell():
    lengths = {"fits": 64, "odd": 20, "wide": 48}
    params = {name: jnp.ones((n, 4)) for name, n in lengths.items()} | {"bias": jnp.ones((1, 4))}

    def apply(params):
        return sum(jnp.ones((1, n)) @ params[name] for name, n in lengths.items()) + params["bias"]

    text = r"float: groups of 32 .* \(odd\); groups of 32 .*; groups of 16 do \(wide\)\. Choose"
    with pytest.warns(UserWarning, match=text):
        rules = jq.uses(apply, params).rules(jq.ArrayConfig(format=jq.INT4, group_size=32))
    report = jq.tree.report(params, jq.tree.quantize(params, rules), rules)
    reasons = {row.path: row.reason for row in report.rows}
    assert reasons["odd"] == "groups of 32 do not fit 20 contracted elements"
    assert reasons["wide"] == "groups of 32 do not fit 48 contracted elements; groups of 16 do"
    assert reasons["bias"] == "used by add"
    assert reasons["fits"] is None


def test_a_report_warns_of_rules_along_axes_that_the_function_does_not_contract():
    params = {"kernel": jnp.ones((64, 2, 32)), "out": jnp.ones((2, 32, 64))}

    def apply(params):
        heads = jnp.einsum("bd,dhk->bhk", jnp.ones((2, 64)), params["kernel"])
        return jnp.einsum("bhk,hkd->bd", heads, params["out"])

    found = jq.uses(apply, params)
    right = jq.tree.quantize(params, found.rules(jq.W8A16))
    rows = jq.tree.report(params, right, contracted=found.contracted).rows
    assert [row.warning for row in rows] == [None, None]

    wrong = jq.tree.quantize(params, jq.Rule("*", jq.W8A16, axis=-1))
    rows = jq.tree.report(params, wrong, contracted=found.contracted).rows
    assert [row.warning for row in rows] == [
        "scales are shared along axis 2, the function contracts 0: axis=0",
        "scales are shared along axis 2, the function contracts (0, 1): axis=(0, 1)",
    ]

    groups = jq.ArrayConfig(format=jq.INT8, group_size=4)
    rules = [jq.Rule("kernel", groups, axis=0), jq.Rule("out", jq.W8A16, axis=0)]
    costly = jq.tree.quantize(params, rules)
    rows = jq.tree.report(params, costly, contracted=found.contracted).rows
    assert [row.warning for row in rows] == [
        "scales take 8.0 bits per weight; only 4 elements share one",
        "scales take 16.0 bits per weight; give a rule with all contracted axes",
    ]


def test_names_with_special_characters_match_themselves_only():
    params = {"a.b": jnp.ones((8, 4)), "a+b": jnp.ones((8, 4)), "axb": jnp.ones((2, 4))}
    rules = jq.uses(
        lambda p: X @ (p["a.b"] @ jnp.ones((4, 8)) @ p["a+b"]) + p["axb"], params
    ).rules(jq.W8A16)
    q = jq.tree.quantize(params, rules)
    assert [jq.tree.is_quantized(q[n]) for n in params] == [True, True, False]


@pytest.mark.parametrize(
    "call, text",
    [
        (
            lambda: jq.uses("x", {}),  # pyright: ignore[reportArgumentType]
            "uses expects a function .*; got str",
        ),
        (lambda: jq.uses(lambda p: p, {}), "params must contain arrays; got dict .*none"),
        (
            lambda: jq.uses(lambda p: p + 1, jnp.ones((2, 2))).rules(jq.W8A8),
            "rules needs a parameter that is used in a product",
        ),
        (
            lambda: jq.uses(lambda p: X @ p, jnp.ones((8, 4))).rules(jq.W4A16),
            r"groups of 128 do not fit 8 contracted elements; groups of 8 do\. Choose another",
        ),
        (
            lambda: jq.uses(lambda p: X @ p, jnp.ones((8, 4))).rules("W8A8"),  # pyright: ignore[reportArgumentType]
            "rules expects a Scheme or an ArrayConfig, such as jq.W8A8; got 'W8A8'",
        ),
    ],
)
def test_mistakes_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()
