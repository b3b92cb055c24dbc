import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import MXFP4, NVFP4, ArrayConfig, quantize
from jaxquant.core import block_shape, normalize_axes, shared_axes
from jaxquant.core.blocks import join, split

from .. import cases, checks

AXES = [
    (None, 3, (0, 1, 2)),
    (None, 0, ()),
    ((), 2, ()),
    (0, 1, (0,)),
    (-1, 3, (2,)),
    ((-1, 0), 3, (2, 0)),
    ((-3, 2), 3, (0, 2)),
]


@pytest.mark.parametrize("axis, ndim, expected", AXES)
def test_axes_are_counted_from_zero(axis, ndim, expected):
    assert normalize_axes(axis, ndim) == expected
    assert shared_axes(axis, ndim, ArrayConfig()) == expected
    assert shared_axes(axis, ndim, ArrayConfig(per_tensor=True)) == tuple(range(ndim))


NOT_AXES = [1.0, "rows", (0, None), (0, 0), True, [0, 1], {0}, slice(2)]


@pytest.mark.parametrize("axis", NOT_AXES, ids=repr)
def test_an_axis_must_be_an_int_a_tuple_of_ints_or_none(axis):
    with pytest.raises(ValueError, match=r"axis must be an int, a tuple of distinct ints, or None"):
        quantize(jnp.ones((4, 5, 6)), ArrayConfig(), axis=axis)


@pytest.mark.parametrize("axis, ndim", [(2, 2), (-3, 2), ((0, 5), 2)])
def test_axes_must_be_axes_of_the_array(axis, ndim):
    message = rf"axis must lie in -{ndim} .. {ndim - 1} for an array of {ndim} axes; got axis="
    with pytest.raises(ValueError, match=message):
        quantize(jnp.ones((4,) * ndim), ArrayConfig(), axis=axis)


def test_a_scalar_has_no_axes():
    assert quantize(jnp.float32(4), ArrayConfig(), axis=()).codes == 127
    with pytest.raises(ValueError, match=r"axis must be None or \(\) for a scalar.*; got 0\."):
        quantize(jnp.float32(4), ArrayConfig(), axis=0)


def test_axes_must_be_distinct():
    with pytest.raises(ValueError, match=r"distinct axes of the array; got axis=\(.*\) for 2 axes"):
        quantize(jnp.ones((4, 4)), ArrayConfig(), axis=(0, -2))


def test_one_group_size_per_axis_needs_as_many_axes():
    config = ArrayConfig(group_size=(2, 4))
    for axis in (0, (0,), (0, 1, 2)):
        with pytest.raises(ValueError, match=r"one int, or one per axis; got \(2, 4\) for axis"):
            quantize(jnp.ones((4, 4, 4)), config, axis=axis)
    assert quantize(jnp.ones((4, 4)), config, axis=None).scale.shape == (2, 1)


@pytest.mark.parametrize("format", [MXFP4, NVFP4], ids=str)
def test_formats_with_groups_have_them_along_one_axis(format):
    for axis in (None, (0, 1), ()):
        with pytest.raises(
            ValueError, match=rf"{format} needs exactly one axis for its gr.* axis="
        ):
            quantize(jnp.ones((32, 32)), ArrayConfig(format=format), axis=axis)
    assert quantize(jnp.ones((32, 32)), ArrayConfig(format=format), axis=(-1,)).ndim == 2


BLOCKS = [
    ((6, 8), 0, {}, (6, 1)),
    ((6, 8), -1, {"group_size": 4}, (1, 4)),
    ((6, 8), None, {}, (6, 8)),
    ((6, 8), 0, {"per_tensor": True}, (6, 8)),
    ((6, 8), None, {"group_size": 2}, (2, 2)),
    ((6, 8), (1, 0), {"group_size": (4, 3)}, (3, 4)),
    ((6, 8), (1, 0), {"group_size": (None, 3)}, (3, 8)),
    ((6, 8, 5), (-1, 0), {}, (6, 1, 5)),
    ((0, 8), 0, {"group_size": 4}, (4, 1)),
]


@pytest.mark.parametrize("shape, axis, fields, expected", BLOCKS, ids=str)
def test_blocks_have_the_lengths_of_the_groups(shape, axis, fields, expected):
    assert block_shape(shape, ArrayConfig(**fields), axis) == expected


INDIVISIBLE = [
    ((12, 7), 0, 5, r"axis 0; got group_size=5 for shape \(12, 7\)\. .* choose 4 or 6\."),
    ((12, 7), 1, 2, r"axis 1; got group_size=2 for shape \(12, 7\)\. .* choose 1 or 7\."),
    ((12, 7), -1, 9, r"axis 1; got group_size=9 for shape \(12, 7\)\. .* choose 7\."),
    ((12, 7), None, 4, r"axis 1; got group_size=4 for shape \(12, 7\)"),
    ((12, 7), (1, 0), 6, r"axis 1; got group_size=6"),
]


@pytest.mark.parametrize("shape, axis, group_size, message", INDIVISIBLE, ids=str)
def test_a_group_size_must_divide_and_the_error_says_which_would(shape, axis, group_size, message):
    with pytest.raises(ValueError, match=message):
        quantize(jnp.ones(shape), ArrayConfig(group_size=group_size), axis=axis)


def test_arrays_are_reached_by_splitting_axes_and_never_by_moving_them():
    for case in cases.FEW.values():
        jaxpr = jax.make_jaxpr(lambda x, c=case: quantize(x, *c))(cases.gaussian())
        assert "transpose" not in str(jaxpr)


@pytest.mark.parametrize("spec", [("d", None), (None, "d")], ids=str)
def test_blocks_along_two_axes_of_a_sharded_array(spec):
    """With explicit axes, JAX rejects a reshape that splits or joins two axes at once."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
    config = ArrayConfig(group_size=(2, 4))
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    q = quantize(jax.device_put(x, sharding), config, (0, 1))
    assert q.codes.sharding == q.dequantize().sharding == sharding
    checks.assert_equal_quantized(q, quantize(jnp.asarray(x), config, (0, 1)))


def test_join_is_the_inverse_of_split():
    x = jnp.arange(2 * 6 * 4 * 5).reshape(2, 6, 4, 5)
    for blocks in itertools.product((1, 2), (1, 2, 6), (1, 2, 4), (1, 5)):
        values, inner = split(x, blocks)
        assert [values.shape[a] for a in inner] == [n for n in blocks if n > 1]
        np.testing.assert_array_equal(join(values, x.shape, blocks), x)
