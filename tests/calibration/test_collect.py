import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant.methods import CrossMoment, MaxAbs, MeanAbs, MeanSquare, SecondMoment

KINDS = [MeanSquare, MeanAbs, MaxAbs, SecondMoment]


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def expected_means(x):
    """From the definitions, for rows (rows, channels)."""
    x = np.asarray(x, np.float64)
    return {
        MeanSquare: np.mean(x**2, 0),
        MeanAbs: np.mean(np.abs(x), 0),
        MaxAbs: np.max(np.abs(x), 0),
        SecondMoment: x.T @ x / len(x),
    }


def assert_means(found, x):
    for kind, expected in expected_means(x).items():
        np.testing.assert_allclose(found[kind].finish(), expected, rtol=1e-4, atol=1e-6)
    assert np.all(found[SecondMoment].count == len(x))


def slice_of(found, i):
    return {kind: jax.tree.map(lambda a: a[i], s) for kind, s in found.items()}


def dense(params, x):
    return x @ params["kernel"]


def test_batches_of_different_sizes_count_by_their_rows():
    params = {"kernel": jnp.asarray(rows(5, 3)), "unused": jnp.ones(3)}
    batches = [rows(2, 4, 5), rows(1, 3, 5, seed=1)]
    found = jq.collect(dense, params, batches, jq.Rule("kernel", jq.W8A8), KINDS)
    assert list(found) == ["kernel"]
    assert_means(found["kernel"], np.concatenate([b.reshape(-1, 5) for b in batches]))


def test_bfloat16_rows_are_summed_in_float32():
    params = {"kernel": jnp.ones((16, 8), jnp.bfloat16)}
    x = jnp.asarray(rows(1000, 16), jnp.bfloat16)
    found = jq.collect(dense, params, [x], jq.W8A8, KINDS)
    assert_means(found["kernel"], x)


def test_masked_rows_do_not_count_even_if_they_are_not_finite():
    params = {"kernel": jnp.ones((4, 2))}
    x, mask = rows(2, 3, 4), np.array([[1, 1, 0], [1, 0, 0]])
    x[mask == 0] = np.nan

    def apply(params, batch):
        return dense(params, batch["x"])

    found = jq.collect(
        apply, params, [{"x": x, "mask": mask}], jq.W8A8, KINDS, mask=lambda b: b["mask"]
    )
    assert_means(found["kernel"], x[mask == 1])


def test_the_mask_fits_rows_that_were_flattened_or_have_more_axes():
    params = {"flat": jnp.ones((4, 2)), "heads": jnp.ones((2, 3))}
    x, mask = rows(2, 3, 4), np.array([[1, 1, 0], [1, 0, 0]])

    def apply(params, batch):
        flat = batch["x"].reshape(-1, 4) @ params["flat"]
        return flat, batch["x"].reshape(2, 3, 2, 2) @ params["heads"]

    found = jq.collect(
        apply, params, [{"x": x, "mask": mask}], jq.W8A8, KINDS, mask=lambda b: b["mask"]
    )
    assert_means(found["flat"], x[mask == 1])
    assert_means(found["heads"], x[mask == 1].reshape(-1, 2))


def test_each_layer_of_a_scan_has_its_own_statistics():
    params = {"layers": jnp.asarray(rows(3, 4, 4))}

    def apply(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]

    x = rows(6, 4)
    found = jq.collect(apply, params, [x, x], jq.W8A8, KINDS)["layers"]
    assert found[SecondMoment].total.shape == (3, 4, 4)
    for layer in range(3):
        assert_means(slice_of(found, layer), np.concatenate([x, x]))
        x = np.tanh(x @ np.asarray(params["layers"][layer]))


def test_each_expert_of_a_batched_product_has_its_own_statistics():
    params = {"experts": jnp.ones((3, 4, 2))}
    x = rows(3, 5, 4)

    def apply(params, x):
        return jnp.einsum("etk,ekn->etn", x, params["experts"])

    found = jq.collect(apply, params, [x], jq.W8A8, KINDS)["experts"]
    for i in range(3):
        assert_means(
            {kind: jax.tree.map(lambda a, i=i: a[i], s) for kind, s in found.items()}, x[i]
        )


def test_each_expert_of_a_ragged_product_has_its_own_statistics():
    params = {"experts": jnp.ones((3, 4, 2))}
    x, sizes = rows(7, 4), np.array([2, 0, 4])  # The last row belongs to no expert.

    def apply(params, batch):
        return jax.lax.ragged_dot(batch[0], params["experts"], batch[1])

    with pytest.raises(ValueError, match=r"experts: no row reached 1 of its 3 slices"):
        jq.collect(apply, params, [(x, sizes)], jq.W8A8, KINDS)
    found = jq.collect(apply, params, [(x, sizes)], jq.W8A8, KINDS, allow_missing=True)["experts"]
    for i, part in enumerate((x[:2], None, x[2:6])):
        one = slice_of(found, i)
        if part is None:
            assert one[SecondMoment].count == 0
        else:
            assert_means(one, part)


def test_the_table_has_no_gain_of_parameters_that_met_nothing():
    params = {"unused": jnp.ones((4, 2)), "used": jnp.ones((4, 2))}
    rules = [jq.Rule("*", jq.ArrayConfig(), axis=0)]
    found = jq.collect(
        lambda params, x: x @ params["used"], params, [rows(7, 4)], rules, KINDS, allow_missing=True
    )
    unused, used = map(str, list(found.table().columns)[-1].cells)
    assert unused == ""
    assert used.endswith(" dB")


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_the_rows_of_a_convolution_are_its_windows(padding):
    kernel, images = rows(2, 3, 2, 4), rows(2, 5, 6, 2, seed=1)

    def apply(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["kernel"], (2, 1), padding, dimension_numbers=numbers
        )

    rule = jq.Rule("kernel", jq.W8A8, axis=(0, 1, 2))
    found = jq.collect(apply, {"kernel": kernel}, [images], rule, KINDS)["kernel"]
    high, wide = (3, 6) if padding == "SAME" else (2, 4)
    padded = images
    if padding == "SAME":  # One row is added below, one column at each side.
        padded = np.pad(images, ((0, 0), (0, 1), (1, 1), (0, 0)))
    windows = [
        padded[i, 2 * y : 2 * y + 2, x : x + 3].reshape(-1)
        for i in range(2)
        for y in range(high)
        for x in range(wide)
    ]
    assert_means(found, np.stack(windows))
    # The windows are in the order of the kernel's elements.
    out = np.asarray(apply({"kernel": kernel}, images))
    np.testing.assert_allclose(
        np.stack(windows) @ kernel.reshape(-1, 4), out.reshape(-1, 4), rtol=1e-4, atol=1e-5
    )


def test_the_windows_follow_kernels_with_output_channels_first():
    kernel, images = rows(4, 2, 2, 3), rows(1, 2, 4, 4, seed=1)

    def apply(params, x):
        return jax.lax.conv_general_dilated(x, params["kernel"], (1, 1), "VALID")

    rule = jq.Rule("kernel", jq.W8A8, axis=(1, 2, 3))
    found = jq.collect(apply, {"kernel": kernel}, [images], rule, SecondMoment)["kernel"]
    windows = [images[0, :, y : y + 2, x : x + 3] for y in range(3) for x in range(2)]
    flat = np.stack(windows).reshape(6, -1)
    np.testing.assert_allclose(found[SecondMoment].finish(), flat.T @ flat / 6, rtol=1e-4)


def test_several_contracted_axes_are_flattened_in_the_order_of_the_kernel():
    params = {"out": jnp.asarray(rows(2, 3, 4))}
    x = rows(5, 3, 2)

    def apply(params, x):
        return jnp.einsum("tdh,hdn->tn", x, params["out"])

    found = jq.collect(apply, params, [x], jq.Rule("out", jq.W8A8, axis=(0, 1)), KINDS)
    assert_means(found["out"], x.transpose(0, 2, 1).reshape(5, 6))


def two_layers(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


def test_cross_moments_pair_the_activations_of_both_models():
    params = {"first": jnp.asarray(rows(4, 6)), "second": jnp.asarray(rows(6, 3, seed=1))}
    rules = jq.Rule("*", jq.ArrayConfig(format=jq.INT4), axis=0)
    quantized = jq.tree.quantize(params, rules)
    x = rows(50, 4, seed=2)
    found = jq.collect(
        two_layers, params, [x, x], rules, [CrossMoment, SecondMoment], quantized=quantized
    )
    hidden, other = (
        np.tanh(x @ np.asarray(w)) for w in (params["first"], quantized["first"].dequantize())
    )
    cross, second = found["second"][CrossMoment].finish()
    np.testing.assert_allclose(cross, hidden.T @ other / 50, rtol=1e-4)
    np.testing.assert_allclose(second, other.T @ other / 50, rtol=1e-4)
    plain = found["second"][SecondMoment].finish()
    np.testing.assert_allclose(plain, hidden.T @ hidden / 50, rtol=1e-4)
    assert found["second"][CrossMoment].count == 100
    first = found["first"][CrossMoment].finish()
    np.testing.assert_allclose(first[0], first[1], rtol=1e-6)


def test_cross_moments_of_scanned_layers():
    params = {"layers": jnp.asarray(rows(2, 4, 4))}
    rules = jq.Rule("layers", jq.ArrayConfig(format=jq.INT4), axis=1)
    quantized = jq.tree.quantize(params, rules)

    def apply(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]

    x = rows(20, 4)
    found = jq.collect(apply, params, [x], rules, CrossMoment, quantized=quantized)["layers"]
    a, b = (
        np.tanh(x @ np.asarray(w[0])) for w in (params["layers"], quantized["layers"].dequantize())
    )
    cross, second = found[CrossMoment].finish()[1]
    np.testing.assert_allclose(cross, a.T @ b / 20, rtol=1e-4)
    np.testing.assert_allclose(second, b.T @ b / 20, rtol=1e-4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_on_several_devices_are_added(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    x = rows(16, 4)
    sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
    found = jq.collect(dense, {"kernel": jnp.ones((4, 2))}, [sharded], jq.W8A8, KINDS)
    assert_means(found["kernel"], x)


def test_parts_of_shard_map_are_added():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = rows(16, 4)

    def apply(params, x):
        return jax.shard_map(dense, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(
            params, x
        )

    found = jq.collect(apply, {"kernel": jnp.ones((4, 2))}, [x], jq.W8A8, KINDS)
    assert_means(found["kernel"], x)


def test_statistics_are_saved_loaded_and_merged(tmp_path):
    params = {"a": {"kernel": jnp.ones((4, 2))}}

    def apply(params, x):
        return dense(params["a"], x)

    parts = [rows(3, 4), rows(5, 4, seed=1)]
    found = [jq.collect(apply, params, [x], jq.W8A8, KINDS) for x in parts]
    found[0].save(tmp_path / "first.safetensors")
    loaded = jq.Statistics.load(tmp_path / "first.safetensors")
    assert loaded.is_complete
    both = loaded.merge(found[1])
    assert_means(both["a/kernel"], np.concatenate(parts))
    assert "a/kernel" in str(both)
    other = dataclasses.replace(found[1], by_path={"b": {}})
    with pytest.raises(ValueError, match=r"got different ones of a/kernel, b\."):
        loaded.merge(other)
    narrow = jq.collect(apply, {"a": {"kernel": jnp.ones((6, 2))}}, [rows(3, 6)], jq.W8A8, KINDS)
    with pytest.raises(ValueError, match=r"got different ones of a/kernel\."):
        loaded.merge(narrow)


def test_a_file_of_another_kind_is_refused(tmp_path):
    jq.save(tmp_path / "tree.safetensors", {"kernel": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"tree.safetensors does not hold statistics; got dict"):
        jq.Statistics.load(tmp_path / "tree.safetensors")


@pytest.mark.parametrize(
    ("by_path", "text"),
    [
        ([["a", {"Median": [np.ones(3), np.ones(())]}]], "MeanSquare, .*; got 'Median'"),
        ([["a", {"SecondMoment": [np.ones(3), np.ones(())]}]], r"shape \(3, 3\); got \(3,\)"),
        ([["a", {"MeanSquare": [np.ones(3)]}]], "got ValueError: not enough values"),
        ([["a", [1, 2]]], "got AttributeError: 'list' object has no"),
        (3, "got TypeError: 'int' object is not iterable"),
        (None, "got KeyError: 'by_path'"),
    ],
)
def test_malformed_statistics_are_errors(tmp_path, by_path, text):
    tree = {"kind": "statistics of activations", "is_complete": 1, "by_path": by_path}
    path = tmp_path / "a.safetensors"
    jq.save(path, {k: v for k, v in tree.items() if v is not None})
    with pytest.raises(ValueError, match=rf"a.safetensors holds malformed statistics; .*{text}"):
        jq.Statistics.load(path)


def test_the_table_shows_the_predicted_gain():
    x = np.random.default_rng(0).normal(size=(500, 1)) + 0.1 * rows(500, 8)
    found = jq.collect(dense, {"kernel": jnp.ones((8, 2))}, [x], jq.W8A8, SecondMoment)
    assert "dB" in str(found)


def test_methods_and_lists_of_them_name_what_they_need():
    params = {"kernel": jnp.ones((4, 2))}
    methods = [[jq.methods.SINQ(), jq.methods.GPTQ()], jq.methods.Importance()]
    found = jq.collect(dense, params, [rows(3, 4)], jq.W8A8, methods)
    assert set(found["kernel"]) == {SecondMoment, MeanSquare}


def used_twice(params, x):
    return x @ params["kernel"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"statistics": []}, r"collect needs a statistic; got \[\]"),
        ({"statistics": "MeanSquare"}, r"statistics must be classes .*; got 'MeanSquare'\."),
        ({"statistics": CrossMoment}, r"CrossMoment compares .*; got quantized=None"),
        (
            {"statistics": CrossMoment, "quantized": {"other": np.ones((4, 2))}},
            r"quantized must have the structure of params, PyTreeDef.*; got PyTreeDef",
        ),
        (
            {"statistics": CrossMoment, "quantized": {"kernel": np.ones((2, 4))}},
            r"quantized must have the shapes .*; got \(2, 4\) for kernel of shape \(4, 2\)",
        ),
        (
            {"batches": {"x": rows(3, 4)}},
            r"batches must be a list of .*; got a dict\. Pass",
        ),
        ({"batches": ["hello"]}, r"batches must hold arrays of .*; got one of str\. Convert tens"),
        ({"batches": 3.0}, r"batches must be a list of what the model is called with.*got a float"),
        ({"batches": jnp.ones(())}, r"batches must be a list of what .*; got a ArrayImpl\. Pass"),
        ({"batches": []}, r"batches must hold at least one batch; got a list without any\. Pass"),
        ({"batches": iter(())}, r"at least one batch; got a tuple_iterator without any"),
        (
            {"batches": [np.full((3, 4), np.nan)]},
            r"kernel: activations must be finite, .*; got NaN or Inf\.",
        ),
        ({"mask": lambda x: jnp.ones(7)}, r"kernel: the mask must have .*; got \(7,\) for rows"),
    ],
)
def test_bad_arguments(arguments, message):
    given = {"batches": [rows(3, 4)], "statistics": MeanSquare, **arguments}
    with pytest.raises(ValueError, match=message):
        jq.collect(used_twice, {"kernel": jnp.ones((4, 2))}, rules=jq.W8A8, **given)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(4, 4), (4, 6)])
def test_products_along_other_axes_than_the_rule_names_are_an_error(shape, axis):
    def tied(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"].T

    text = rf"w: products must contract the axes of its rule, of {shape[axis]} channels; got dot_g"
    rule = jq.Rule("w", jq.W8A8, axis=axis)
    with pytest.raises(ValueError, match=text):
        jq.collect(tied, {"w": jnp.ones(shape)}, [rows(3, 4)], rule, MeanSquare)


def test_products_of_some_of_the_channels_are_an_error():
    def halves(params, x):
        return x[:, :2] @ params["kernel"][:2] + x[:, 2:] @ params["kernel"][2:]

    with pytest.raises(ValueError, match=r"rule, of 4 channels; got .* of \(2, 3\) .*, of 2\."):
        jq.collect(halves, {"kernel": jnp.ones((4, 3))}, [rows(3, 4)], jq.W8A8, MeanSquare)


def test_layers_that_are_indexed_one_by_one_are_an_error():
    """A tap does not see which layer it is, so sums of several would be mixed."""

    def unrolled(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params["layers"][i])
        return x

    with pytest.raises(ValueError, match=r"layers: products must use the whole stack, .*\(4, 4\)"):
        jq.collect(unrolled, {"layers": jnp.ones((3, 4, 4))}, [rows(3, 4)], jq.W8A8, MeanSquare)


def test_reshaped_parameters_and_slices_of_outputs_see_the_same_rows():
    def apply(params, x):
        flat = params["heads"].reshape(4, 6)
        return x @ flat, x @ params["kernel"][:, :3], x @ params["kernel"][:, 3:]

    params, x = {"heads": jnp.ones((4, 2, 3)), "kernel": jnp.ones((4, 5))}, rows(7, 4)
    rules = jq.Rule("*", jq.W8A8, axis=0)
    found = jq.collect(apply, params, [x], rules, KINDS)
    assert_means(found["heads"], x)
    np.testing.assert_allclose(
        found["kernel"][SecondMoment].finish(), expected_means(x)[SecondMoment], rtol=1e-4
    )


def test_batches_without_rows_add_nothing():
    batches = [rows(2, 3, 4), rows(0, 3, 4)]
    found = jq.collect(dense, {"kernel": jnp.ones((4, 2))}, batches, jq.W8A8, KINDS)
    assert_means(found["kernel"], batches[0].reshape(-1, 4))

    def mask(x):
        return jnp.ones(x.shape[:2])

    found = jq.collect(dense, {"kernel": jnp.ones((4, 2))}, batches, jq.W8A8, KINDS, mask=mask)
    assert_means(found["kernel"], batches[0].reshape(-1, 4))


def test_collecting_while_jax_traces_is_an_error():
    params = {"kernel": jnp.ones((4, 2))}
    collect = functools.partial(jq.collect, dense, rules=jq.W8A8, statistics=MeanSquare)
    for traced in (lambda x: collect(params, [x]), lambda x: collect(params, [rows(3, 4)])):
        with pytest.raises(ValueError, match="got a call within a function that JAX traces"):
            jax.jit(traced)(rows(3, 4))


def test_a_parameter_that_is_only_looked_up_is_an_error():
    params = {"table": jnp.ones((8, 4))}
    with pytest.raises(ValueError, match=r"table: no batch reached 1 of its 1 slices"):
        jq.collect(lambda p, x: p["table"][x], params, [np.arange(3)], jq.W8A8, MeanSquare)
