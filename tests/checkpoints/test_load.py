"""Loading tensors of a checkpoint: which, in which shape and dtype, and onto which devices."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.checkpoints import put, swapped
from jaxquant.checkpoints.own import open_own

P = jax.P


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tree():
    x = normal(64, 48)
    offset = jq.quantize(x, jq.ArrayConfig(format=jq.INT4, group_size=16), axis=1)
    return {
        "layers.0.w": jq.quantize(x, jq.ArrayConfig(format=jq.INT4, group_size=16), axis=1),
        "layers.0.odd": jq.quantize(x[:5, :3], jq.ArrayConfig(format=jq.INT4), axis=1),
        "layers.1.nested": jq.quantize(x, jq.ArrayConfig(format=jq.NVFP4), axis=1),
        "layers.1.w": dataclasses.replace(offset, offset=offset.scale, order=(-1, -2)),
        "int2": jq.quantize(x, jq.ArrayConfig(format=jq.INT2, symmetric=False), axis=1),
        "norm": jnp.asarray(normal(48), jnp.bfloat16),
        "fp8": jq.quantize(x, jq.ArrayConfig(format=jq.FP8_E4M3), axis=1),
        "ids": jnp.arange(6),
        "scalar": jnp.float32(3),
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "model.safetensors"
    jq.save(path, tree(), {"note": "mine"})
    return path


@pytest.fixture
def checkpoint(path):
    return open_own(path)


def assert_same(found, want):
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_files_of_save_load_bit_for_bit(checkpoint):
    assert_same(checkpoint.load(), tree())
    assert checkpoint.metadata == {"note": "mine"}
    assert len(checkpoint) == len(tree())
    assert repr(checkpoint).endswith("model.safetensors', jaxquant, tensors=9)")


@pytest.mark.parametrize("name", [k for k, v in tree().items() if v.shape])
def test_slices_are_those_of_the_whole(checkpoint, name):
    for source in jax.tree.leaves(checkpoint[name].value):
        whole = source.read()
        random = np.random.default_rng(0)
        for _ in range(20):
            index = tuple(slice(*sorted(random.integers(0, n + 1, 2))) for n in source.shape)
            assert source.read(index).tobytes() == whole[index].tobytes()


def test_a_tree_says_which_tensors_go_where(checkpoint):
    wanted = {
        "layers": [{"w": jax.ShapeDtypeStruct((64, 48), jnp.float32)}],
        "by name": "norm",
        "turned": {"kernel": "layers.1.w"},
    }
    found = checkpoint.load(wanted)
    assert_same(found["layers"][0]["w"], tree()["layers.0.w"])
    assert_same(found["by name"], tree()["norm"])
    assert_same(checkpoint.load("norm"), {"norm": tree()["norm"]})


@pytest.mark.parametrize("name", ["layers.0.w", "layers.1.w"])
def test_a_shape_with_swapped_axes_changes_the_order_alone(checkpoint, name):
    stored = tree()[name]
    like = {name: jnp.zeros(stored.shape[::-1])}
    found = checkpoint.load(like)[name]
    assert found.codes.shape == stored.codes.shape
    np.testing.assert_array_equal(found.dequantize(), stored.dequantize().T)


def test_float_matrices_are_swapped_too(tmp_path):
    jq.save(tmp_path / "a", {"w": normal(3, 5)})
    found = open_own(tmp_path / "a").load({"w": jnp.zeros((5, 3))})
    np.testing.assert_array_equal(found["w"], normal(3, 5).T)


def test_swapping_twice_gives_the_same(checkpoint):
    for name in ("layers.0.w", "layers.1.w"):
        value = checkpoint[name].value
        again = swapped(swapped(value))
        assert isinstance(again, jq.QTensor)
        assert again.order == value.order


def test_dtype_is_that_of_floats_and_of_what_is_dequantized(checkpoint):
    found = checkpoint.load(dtype=jnp.bfloat16)
    assert found["norm"].dtype == found["layers.0.w"].dtype == jnp.bfloat16
    assert found["layers.0.w"].scale.dtype == jnp.float32
    assert found["ids"].dtype == tree()["ids"].dtype
    assert found["scalar"].dtype == jnp.bfloat16


@pytest.mark.parametrize("spec", [P("a", None), P(None, "a"), P("a", "b")], ids=str)
def test_matrices_are_divided_among_devices(checkpoint, spec):
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)
    sharding = jax.NamedSharding(mesh, spec)

    def of(name, shape):
        return sharding if shape == (64, 48) else None

    for found in (checkpoint.load(sharding=of), _as_tree(checkpoint, of)):
        for name, want in tree().items():
            is_divided = isinstance(want, jq.QTensor) and want.shape == (64, 48)
            want = jq.refine_blocks(want, spec, mesh) if is_divided else want
            assert_same(found[name], want)
            if is_divided:
                assert len(found[name].codes.addressable_shards) == 8
                placed = jq.specs(want, spec, mesh)
                assert found[name].codes.sharding.is_equivalent_to(
                    sharding.update(spec=placed.codes), 2
                )


def test_blocks_that_devices_would_share_are_refined_as_they_are_read(tmp_path):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    config = jq.ArrayConfig(format=jq.INT4, group_size=32, symmetric=False)
    w = {"w": jq.quantize(normal(16, 576), config, axis=1)}
    jq.save(tmp_path / "a", w)
    sharding = jax.NamedSharding(mesh, P(None, "a"))
    (found,) = open_own(tmp_path / "a").load(sharding=sharding).values()
    assert found.scale.shape == found.zero_point.shape == (16, 72)
    for x in (found.codes, found.scale, found.zero_point):
        assert len({str(shard.index) for shard in x.addressable_shards}) == 8
    np.testing.assert_array_equal(found.dequantize(), w["w"].dequantize())


def _as_tree(checkpoint, of):
    replicated = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = {n: of(n, s.shape) or replicated for n, s in checkpoint.items()}
    return checkpoint.load(sharding=shardings)


def test_one_sharding_may_be_for_all(checkpoint):
    device = jax.devices()[3]
    found = checkpoint.load(sharding=jax.sharding.SingleDeviceSharding(device))
    assert {d for x in jax.tree.leaves(found) for d in x.devices()} == {device}


def test_stacked_layers_load_as_one_array(tmp_path):
    layers = [jq.quantize(normal(8, 6, seed=s), jq.ArrayConfig(), axis=1) for s in range(3)]
    jq.save(tmp_path / "a", {str(i): q for i, q in enumerate(layers)})
    values = [stored.value for stored in open_own(tmp_path / "a").values()]
    found = put(jax.tree.map(lambda *s: jq.checkpoints.stack(s), *values))
    assert_same(found, jax.tree.map(lambda *x: jnp.stack(x), *layers))


def test_progress_names_each_tensor(checkpoint):
    seen = []
    checkpoint.load(["norm", "fp8"], progress=lambda *step: seen.append(step))
    assert seen == [(1, 2, "fp8"), (2, 2, "norm")]


@pytest.mark.parametrize(
    ("load", "text"),
    [
        (lambda c: c.load(["nothing"]), "1 of 1 tensors are not in the checkpoint, such as nothi"),
        (
            lambda c: c.load({"norm": jnp.ones(3)}),
            r"norm: the checkpoint stores 'norm' with shape \(48,\), and the tree has shape \(3,\)",
        ),
        (
            lambda c: c.load(["norm"], sharding={"other": None}),
            "sharding must be a sharding, a function of",
        ),
    ],
)
def test_requests_that_do_not_fit_are_errors(checkpoint, load, text):
    with pytest.raises(ValueError, match=text):
        load(checkpoint)


def test_an_unknown_name_is_a_keyerror_that_lists_names(checkpoint):
    with pytest.raises(KeyError, match="has no tensor 'nothing'; it has"):
        checkpoint["nothing"]


def test_an_altered_tensor_is_found_when_it_is_read(path, tmp_path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    (tmp_path / "a").write_bytes(data)
    altered = open_own(tmp_path / "a")
    with pytest.raises(ValueError, match=r"was altered: tensor '.*' does not have its checksum"):
        altered.load()


def test_a_file_that_becomes_shorter_is_an_error(path, tmp_path):
    (tmp_path / "a").write_bytes(path.read_bytes())
    opened = open_own(tmp_path / "a")
    os.truncate(tmp_path / "a", path.stat().st_size - 1)
    with pytest.raises(ValueError, match="was truncated after it was opened"):
        opened.load()


def test_a_report_says_what_becomes_of_each_tensor(checkpoint):
    report = checkpoint.report()
    rows = {row.name: row for row in report.rows}
    assert rows["layers.0.w"].becomes == "int4 g16"
    assert rows["layers.0.w"].bits_per_weight == pytest.approx(4 + 32 / 16)
    assert (rows["norm"].kind, rows["norm"].becomes) == ("bfloat16", "bfloat16")
    assert all(row.is_exact for row in report.rows)
    assert rows["fp8"].bytes_loaded == 64 * 48 + 4 * 64
    text = str(report)
    assert "layers.1.nested" in text
    assert "9 of 9" in text
    assert report.to_json()["rows"][0]["name"] == "fp8"


def test_a_report_says_why_a_tensor_is_not_exact(checkpoint):
    stored = dataclasses.replace(checkpoint["norm"], note="rounded to bfloat16")
    report = dataclasses.replace(checkpoint, tensors={"norm": stored}).report()
    assert not report.rows[0].is_exact
    assert "rounded to bfloat16" in str(report)
