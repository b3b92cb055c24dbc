"""Blocks of optimizer states, such that devices share states as they share parameters."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from jaxquant import FP8_E4M3, INT4, MXFP8, ArrayConfig, training
from jaxquant.training import STATE_4_BIT, STATE_8_BIT, Blockwise
from jaxquant.training.blockwise import quantize_blocks
from jaxquant.training.state_blocks import Layout, Padding, layout_of

DEVICES = 8


@pytest.fixture(autouse=True)
def _implicit_promotion():
    """Optax needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# Shape of an array: block lengths, and padded shape if it is padded.
BLOCKS = {
    (4096, 4096): ((128, 1), None),
    (24, 1024, 4096): ((1, 128, 1), None),
    (256, 16, 64): ((32, 2, 1), None),
    (12, 256, 80): ((3, 32, 1), None),
    (512, 64): ((64, 1), None),
    (16, 64, 3, 3): ((2, 8, 3, 1), None),
    (3, 3, 64, 128): ((3, 3, 8, 1), None),
    (8, 8, 8, 8): ((4, 4, 4, 1), None),
    (8248, 1031): ((115, 1), (8280, 1031)),
    (1000, 80): ((125, 1), None),
    (13824, 5120): ((96, 1), None),
    (50257, 768): ((128, 1), (50304, 768)),
    (700, 6): ((88, 1), (704, 6)),
    (16, 512): ((2, 64), None),
    (8192,): ((128,), None),
    (4099,): ((125,), (4125,)),
    (10,): ((10,), None),
}


@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_blocks_of_many_shapes(shape):
    layout = layout_of(shape, ArrayConfig())
    blocks, padded = BLOCKS[shape]
    assert (layout.blocks, layout.shape) == (blocks, padded or shape)
    assert (layout.padding is None) == (padded is None)
    found = jax.eval_shape(
        lambda x: quantize_blocks(x, ArrayConfig()), jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    )
    assert found.q.codes.shape == layout.shape
    assert found.q.scale.size == math.prod(layout.shape) // math.prod(blocks)
    again = jax.eval_shape(Blockwise.dequantize, found)
    assert (again.shape, again.dtype) == (shape, jnp.bfloat16)


@pytest.mark.parametrize(
    "shape, padded", [((64, 4), (64, 4)), ((6, 64), (6, 64)), ((33, 20), (33, 32)), ((5,), (32,))]
)
def test_formats_with_a_fixed_group_size_keep_it(shape, padded):
    layout = layout_of(shape, ArrayConfig(format=MXFP8))
    assert sorted(layout.blocks)[-1] == math.prod(layout.blocks) == 32
    assert layout.shape == padded
    assert (layout.padding is None) == (padded == shape)


def test_the_group_size_is_the_largest_block():
    for length in (1, 2, 5, 64, 1000):
        blocks = layout_of((640, 96, 10), ArrayConfig(group_size=length)).blocks
        assert length / 4 <= math.prod(blocks) <= length


def test_an_axis_is_not_padded_by_more_than_an_eighth():
    layout = layout_of((56, 3), ArrayConfig(group_size=5))
    assert layout == Layout((1, 3), (56, 3))


@pytest.mark.parametrize("config", [ArrayConfig(), ArrayConfig(format=MXFP8)], ids=str)
@pytest.mark.parametrize("shape", [(700, 6), (33, 20), (5,), (3, 131, 7)], ids=str)
def test_padding_leaves_the_values_as_they_are(shape, config):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    stored = quantize_blocks(jnp.asarray(x), config)
    assert np.max(np.abs(stored.dequantize() - x)) <= np.max(np.abs(x)) / 8
    both = jax.vmap(lambda x: quantize_blocks(x, config))(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(both.dequantize()[0], stored.dequantize())
    np.testing.assert_allclose(both.dequantize()[1], 2 * stored.dequantize())


def test_padding_is_added_to_each_part():
    x = jnp.arange(2 * 6 * 3).reshape(2, 6, 3)
    padding = Padding(-2, 2, 6)
    padded = padding.add(x, 10)
    expected = np.pad(np.asarray(x).reshape(2, 2, 3, 3), ((0, 0), (0, 0), (0, 2), (0, 0)))
    np.testing.assert_array_equal(padded, expected.reshape(2, 10, 3))
    np.testing.assert_array_equal(padding.remove(padded), x)


SHARDED = [(256, 16, 64), (12, 256, 80), (512, 64), (16, 64, 3, 3), (8248, 131), (1000, 80)]
CASES = [(s, a) for s in SHARDED for a in range(len(s)) if s[a] % DEVICES == 0]
COLLECTIVES = "all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"


def parts_of(x):
    """Among how many devices an array is divided."""
    return x.size // x.addressable_shards[0].data.size


@pytest.mark.some_rows(3)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("shape, axis", CASES, ids=str)
def test_states_are_sharded_as_their_parameters_without_communication(shape, axis, kind):
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(kind,))
    sharding = jax.NamedSharding(
        mesh, jax.P(*("d" if a == axis else None for a in range(len(shape))))
    )
    rows = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    params = jax.device_put({"w": rows}, sharding)
    optimizer: Any = training.quantized_state(optax.adamw(1e-3), STATE_4_BIT)
    with jax.set_mesh(mesh):
        first = optimizer.init(params)
        update = jax.jit(optimizer.update)
        program = update.lower(params, first, params).compile()
        updates, state = update(params, first, params)
    assert not re.findall(rf" ({COLLECTIVES})\(", program.as_text() or "")
    assert updates["w"].sharding.is_equivalent_to(sharding, len(shape))
    for inner in (first.inner[0], state.inner[0]):
        for moment in (inner.mu["w"], inner.nu["w"]):
            assert {parts_of(x) for x in jax.tree.leaves(moment)} == {DEVICES}
    alone = {"w": jnp.asarray(rows)}
    _, alone = optimizer.update(alone, optimizer.init(alone), alone)
    np.testing.assert_allclose(
        state.inner[0].nu["w"].dequantize(), alone.inner[0].nu["w"].dequantize(), atol=1e-8
    )


def test_a_step_of_sharded_parameters_gathers_no_state():
    """FSDP: parameters are gathered to compute the loss, states never are."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    shapes = {"up": (96, 200), "down": (200, 96)}
    rows = jax.NamedSharding(mesh, jax.P("d"))
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32, sharding=rows) for k, s in shapes.items()}
    batch = jax.ShapeDtypeStruct((16, 96), jnp.float32, sharding=rows)

    def loss(params, x):
        return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] - x) ** 2)

    def gathered(optimizer):
        state = jax.eval_shape(optimizer.init, params)
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows if x.ndim else None),
            state,
        )

        def step(params, state, x):
            updates, state = optimizer.update(jax.grad(loss)(params, x), state, params)
            return optax.apply_updates(params, updates), state

        text = jax.jit(step).lower(params, state, batch).compile().as_text()
        return sorted(re.findall(r"= (\S+) all-gather\(", text or ""))

    plain = gathered(optax.adamw(1e-3))
    assert plain
    for rules in (STATE_8_BIT, STATE_4_BIT):
        assert gathered(training.quantized_state(optax.adamw(1e-3), rules)) == plain


def test_blocks_hold_scales_of_their_elements():
    """The largest element of each block is stored exactly."""
    x = np.random.default_rng(0).normal(size=(1000, 80)).astype(np.float32)
    for format in (INT4, FP8_E4M3):
        stored = quantize_blocks(jnp.asarray(x), ArrayConfig(format=format))
        scale = np.abs(x).reshape(8, 125, 80).max(1)
        qmax = {INT4: 7, FP8_E4M3: 448}[format]
        np.testing.assert_allclose(stored.q.scale, scale / qmax, rtol=1e-6)
