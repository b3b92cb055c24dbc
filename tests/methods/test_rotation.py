"""The transform that rotates a matrix, and its statistics, against dense matrices in float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.methods import CrossMoment, MaxAbs, MeanSquare, Rotation, SecondMoment
from jaxquant.methods.rotation import check_order, rotated

CONFIG = jq.ArrayConfig(format=jq.INT4)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    ("channels", "block", "found"),
    [
        (384, None, 128),
        (576, None, 96),
        (1536, None, 128),
        (92, None, 4),
        (7, None, 1),
        (384, 384, 384),
        (576, 36, 36),
        (1536, 1536, 1536),
    ],
)
def test_weights_are_rotated_by_the_matrix_of_the_activations(channels, block, found):
    w, method = normal(3, channels), Rotation(block, seed=5)
    out = method.transform(jnp.asarray(w), {}, CONFIG, 1)
    assert out.multiplier is None
    assert out.rotation is not None
    assert out.rotation.block == found
    matrix = out.rotation.matrix()
    np.testing.assert_allclose(out.weight, w.astype(np.float64) @ matrix, 0, 5e-6)
    np.testing.assert_allclose(np.asarray(out.weight, np.float64) @ matrix.T, w, 0, 5e-6)


def test_signs_depend_on_the_seed_and_the_width_alone():
    signs = [np.asarray(Rotation(8, seed).rotation(64).signs) for seed in (0, 0, 1)]
    assert np.array_equal(signs[0], signs[1])
    assert not np.array_equal(signs[0], signs[2])
    assert {*np.unique(signs[2])} == {-1, 1}


@pytest.mark.slow
def test_moments_are_those_of_rotated_activations():
    x, q = normal(50, 24), normal(50, 24, seed=1)
    rotation = Rotation(12).rotation(24)
    turned = [jnp.asarray(a.astype(np.float64) @ rotation.matrix(), jnp.float32) for a in (x, q)]
    of_pair: Any = [
        CrossMoment.init(24).update(jnp.stack(pair)).finish() for pair in ((x, q), turned)
    ]
    second: Any = [SecondMoment.init(24).update(a).finish() for a in (jnp.asarray(x), turned[0])]
    means = {CrossMoment: of_pair[0], SecondMoment: second[0], MeanSquare: jnp.ones(24)}
    found = rotated(means, rotation)
    assert set(found) == {CrossMoment, SecondMoment}  # Squares of channels do not follow.
    np.testing.assert_allclose(found[CrossMoment], of_pair[1], 0, 1e-4)
    np.testing.assert_allclose(found[SecondMoment], second[1], 0, 1e-4)


@pytest.mark.slow
def test_chains_rotate_parameters_and_gptq_keeps_its_gain():
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 4)) @ random.normal(size=(4, 48)) + 0.1 * random.normal(
        size=(400, 48)
    )
    x, params = jnp.asarray(x, jnp.float32), {"w": jnp.asarray(normal(2, 48, 16))}

    def apply(params, x):
        return jax.lax.scan(lambda carry, w: (carry, x @ w), 0, params["w"])[1]

    statistics = jq.collect(apply, params, [x], CONFIG, [jq.methods.SecondMoment, MeanSquare])
    want, errors = apply(params, x), {}
    for name, method in {
        "nearest": [Rotation(48)],
        "gptq": [Rotation(48), jq.methods.GPTQ()],
        "sinq": [jq.methods.SINQ(), Rotation(48), jq.methods.GPTQ()],
    }.items():
        q = jq.tree.quantize(params, CONFIG, method=method, statistics=statistics)
        assert q["w"].inputs.rotation.signs.shape == (2, 48)
        assert (q["w"].inputs.multiplier is None) == (name != "sinq")
        errors[name] = float(jnp.square(jq.lift(apply)(q, x) - want).mean())
    plain = jq.tree.quantize(params, CONFIG)
    assert errors["gptq"] < 0.5 * errors["nearest"]
    assert errors["sinq"] < 0.5 * errors["nearest"]
    assert errors["nearest"] < 1.5 * float(jnp.square(jq.lift(apply)(plain, x) - want).mean())


def test_rotations_do_not_follow_groups_along_several_axes():
    config = dataclasses.replace(CONFIG, group_size=(2, 2))
    rule = jq.Rule("*", config, axis=(0, 1), method=[Rotation(4)])
    with pytest.raises(ValueError, match="w: a rotation needs groups of adjacent contracted"):
        jq.tree.quantize({"w": jnp.ones((4, 4, 8))}, rule)


def test_stacks_are_rotated_alike_under_jit_and_vmap():
    w, method = jnp.asarray(normal(2, 3, 40)), Rotation(20)

    @jax.jit
    @jax.vmap
    def both(w):
        return method.transform(w, {}, CONFIG, 1)

    found = both(w)
    assert found.rotation is not None
    for i in range(2):
        np.testing.assert_allclose(
            found.weight[i], method.transform(w[i], {}, CONFIG, 1).weight, 0, 1e-6
        )
        np.testing.assert_array_equal(found.rotation.signs[i], method.rotation(40).signs)


def test_outliers_of_weights_lose_less_per_channel():
    w = normal(16, 64)
    w[:, 3] *= 30
    out = Rotation(64).transform(jnp.asarray(w), {}, CONFIG, 1)
    errors = [
        np.square(jq.quantize(x, CONFIG, axis=1).dequantize() - x).mean()
        for x in (jnp.asarray(w), out.weight)
    ]
    assert errors[1] < 0.5 * errors[0]


@dataclasses.dataclass(frozen=True)
class Other:
    statistics: tuple


@dataclasses.dataclass(frozen=True)
class OtherTransform(Other):
    def transform(self, weight, means, config, axis):
        raise AssertionError


@pytest.mark.parametrize("kind", [MeanSquare, MaxAbs])
def test_weighing_channels_after_a_rotation_is_an_error_that_says_why(kind):
    for item in (Other((kind,)), OtherTransform((kind,))):
        with pytest.raises(ValueError, match=rf"{kind.__name__}, which is almost the same for all"):
            check_order((Rotation(), item))
        check_order((item, Rotation(), Other((SecondMoment,))))


def test_transforms_after_a_rotation_are_errors():
    for item in (OtherTransform(()), Rotation(8)):
        with pytest.raises(ValueError, match="A rotation must be the last transform, because act"):
            check_order((Rotation(), item))
    check_order((Rotation(), Other((SecondMoment,))))
    check_order((Other((MeanSquare,)),))


@pytest.mark.parametrize("block", [0, -4, 2.0, True])
def test_blocks_must_be_positive_integers(block):
    with pytest.raises(ValueError, match=f"positive int or None; got {block}"):
        Rotation(block)
    with pytest.raises(ValueError, match="must divide the number of channels, 24; got 16"):
        Rotation(16).rotation(24)
