import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxquant import INT4, INT8, NVFP4, ArrayConfig
from jaxquant.training import GRADIENT_8_BIT, quantized_psum

from .. import oracles

DEVICES = 8
# A result that is equal on all devices, and one that differs.
ONE_AND_EACH = (P(), P("a"))
pytestmark = pytest.mark.usefixtures("quick_compilation")


def mesh(*shape):
    return jax.make_mesh(shape, ("a", "b")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def per_device(function, out_specs=ONE_AND_EACH):
    """jit of shard_map over eight devices, whose arrays lie along the first axis."""
    part = partial(jax.shard_map, mesh=mesh(DEVICES), in_specs=P("a"), out_specs=out_specs)

    def first(tree):
        return jax.tree.map(lambda x: x[0], tree)

    def run(*trees):
        total, *error = function(*map(first, trees))
        return total, *(jax.tree.map(lambda x: x[None], e) for e in error)

    return jax.jit(part(run))


def summed(config, key=None):
    return per_device(lambda x, e: quantized_psum(x, "a", config, key=key, error=e))


def gradients(seed=0):
    """One array for each device: one of odd length, one smaller than a block, an empty one."""
    random = np.random.default_rng(seed)
    shapes = {"odd": (37, 53), "even": (8, 256), "small": (7,), "empty": (0, 3)}
    return {n: random.normal(size=(DEVICES, *s)).astype(np.float32) for n, s in shapes.items()}


def zeros_like(tree):
    return jax.tree.map(np.zeros_like, tree)


def rounded(x, config):
    """dequantize(quantize(x)) of rows of blocks, in float64."""
    codes, scale, _ = oracles.quantize(x, config, -1, oracles.abs_max_range)
    return oracles.code_values(codes, config.format) * oracles.repeat_groups(scale, x.shape)


@pytest.mark.slow
def test_sums_and_errors_match_numpy():
    """Every device rounds all; device d sums part d, and rounds it again."""
    x = {k: gradients()[k] for k in ("even", "odd")}
    error = {k: 0.1 * gradients(1)[k] for k in x}
    total, rest = summed(GRADIENT_8_BIT)(x, error)

    length = 256
    given = [(x[k] + error[k]).reshape(DEVICES, -1) for k in x]
    padded = [np.pad(g, ((0, 0), (0, -g.shape[1] % length))) for g in given]
    row = np.concatenate(padded, 1)
    row = np.pad(row, ((0, 0), (0, -row.shape[1] % (DEVICES * length))))
    sent = rounded(row, GRADIENT_8_BIT)
    result = rounded(sent.sum(0).reshape(DEVICES, -1), GRADIENT_8_BIT).reshape(-1)
    left = row - sent
    parts = left.reshape(DEVICES, DEVICES, -1)
    for d in range(DEVICES):
        parts[d, d] += (sent.sum(0) - result).reshape(DEVICES, -1)[d]
    starts = np.cumsum([0, *(p.shape[1] for p in padded)])
    for name, start, g in zip(x, starts, given, strict=False):
        where = slice(start, start + g.shape[1])
        # A code next to a tie may be the other one, which one step tells.
        close = np.isclose(np.ravel(total[name]), result[where], rtol=1e-5, atol=1e-5)
        assert close.mean() > 0.99
        close = np.isclose(np.reshape(rest[name], (DEVICES, -1)), left[:, where], atol=1e-5)
        assert close.mean() > 0.99


@pytest.mark.some_rows(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    "config, most",
    [
        (GRADIENT_8_BIT, 0.012),
        (ArrayConfig(format=INT4, group_size=125, symmetric=False), 0.15),
        (ArrayConfig(format=NVFP4), 0.25),
    ],
    ids=["default", "int4", "nvfp4"],
)
def test_rounding_errors_are_returned(config, most):
    x, error = gradients(), jax.tree.map(lambda e: 0.1 * e, gradients(1))
    total, rest = summed(config)(x, error)
    for name in x:
        exact = x[name].sum(0) + error[name].sum(0)
        assert total[name].shape == exact.shape
        np.testing.assert_allclose(total[name] + np.sum(rest[name], 0), exact, atol=2e-5)
        largest = np.max(np.abs(exact), initial=0)
        assert np.max(np.abs(total[name] - exact), initial=0) <= most * largest
    np.testing.assert_array_equal(rest["small"], np.zeros((DEVICES, 7)))
    assert np.any(np.asarray(rest["odd"]))


def bytes_sent(text):
    """Bytes that each device sends, from compiled text, by the count that holds for rings.

    Of an array of n bytes, all-reduce sends 2 (d - 1)/d n; of a result of n bytes, all-gather and
    all-to-all (d - 1)/d n.
    """
    size_of = {"f32": 4, "bf16": 2, "u8": 1, "s8": 1}
    found = re.findall(r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter)\(", text)
    total = 0
    for result, operation in found:
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
        size = sum(size_of[t] * math.prod(int(n) for n in s.split(",") if n) for t, s in arrays)
        times = {"all-reduce": 2, "reduce-scatter": DEVICES}.get(operation, 1)
        total += times * (DEVICES - 1) / DEVICES * size
    return total


@pytest.mark.slow
def test_eight_bits_send_little_more_than_a_quarter_of_the_bytes():
    shapes = {"w": (256, 256), "up": (256, 1024), "odd": (123, 45), "bias": (256,), "small": (10,)}
    x = {k: jax.ShapeDtypeStruct((DEVICES, *s), jnp.float32) for k, s in shapes.items()}

    def text(function, out_specs):
        return per_device(function, out_specs).lower(x).compile().as_text() or ""

    size = 4 * sum(math.prod(s) for s in shapes.values())
    plain = bytes_sent(text(lambda x: (jax.lax.psum(x, "a"),), (P(),)))
    assert plain == 2 * 7 / 8 * size
    compiled = text(lambda x: (quantized_psum(x, "a"),), (P(),))
    assert re.search(r"u8\[.* all-to-all\(", compiled)
    assert re.search(r"u8\[.* all-gather\(", compiled)
    assert 0.25 * plain < bytes_sent(compiled) <= 0.27 * plain
    four = ArrayConfig(format=INT4, group_size=128)
    assert bytes_sent(text(lambda x: (quantized_psum(x, "a", four),), (P(),))) <= 0.14 * plain


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_or_inf_on_one_device_makes_its_block_nan_on_all(bad):
    x = {"even": gradients()["even"]}
    x["even"][3, 2, 100] = bad
    total, rest = summed(GRADIENT_8_BIT)(x, zeros_like(x))
    where = np.zeros((8, 256), bool)
    where[2] = True
    np.testing.assert_array_equal(np.isnan(total["even"]), where)
    np.testing.assert_array_equal(np.isnan(rest["even"]).any((0, 2)), where[:, 0])


@pytest.mark.slow
def test_bfloat16_is_summed_over_several_axes_without_error_feedback():
    x = np.random.default_rng(0).normal(size=(DEVICES, 600)).astype(np.float32)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh(4, 2), in_specs=P(("a", "b")), out_specs=P())
    def run(x):
        return quantized_psum(x[0].astype(jnp.bfloat16), ("a", "b"))

    total = run(x)
    assert total.dtype == jnp.bfloat16
    assert np.max(np.abs(total.astype(np.float32) - x.sum(0))) < 0.02 * np.max(np.abs(x.sum(0)))


@pytest.mark.slow
def test_stochastic_rounding_differs_between_devices_and_is_unbiased():
    config = ArrayConfig(format=INT8, value_range=(-3, 3), group_size=64)
    x = np.tile(np.append(np.full(63, 0.3), 1), (DEVICES, 64)).astype(np.float32)

    def average(x):
        return (quantized_psum(x, "a", config, key=jax.random.key(0)),)

    (total,) = per_device(average, (P(),))(x)
    # 3.9 standard deviations of eight roundings, and of one of their sum.
    tolerance = 3.9 * math.sqrt(8 * (1 / 6) ** 2 + (8 / 6) ** 2) / math.sqrt(4032)
    mean = np.mean(np.reshape(total, (64, 64))[:, :63])
    assert abs(mean - 8 * 0.3) < tolerance
    (_, rest) = summed(config, jax.random.key(0))(x, np.zeros_like(x))
    assert len(np.unique(np.asarray(rest), axis=0)) == DEVICES


@pytest.mark.slow
def test_training_on_parts_of_the_data_ends_where_it_does_with_exact_sums():
    """A small network. Without error feedback, what rounding to 4 bits takes away is lost."""
    random, rate, steps = np.random.default_rng(0), 0.1, 300
    x = random.normal(size=(DEVICES, 64, 32)).astype(np.float32)
    hidden = np.tanh(x @ random.normal(size=(32, 16)).astype(np.float32) / np.float32(32**0.5))
    y = hidden @ random.normal(size=(16, 4)).astype(np.float32)
    y += 0.3 * random.normal(size=y.shape).astype(np.float32)
    first = {"up": random.normal(size=(32, 64)) / 32**0.5, "down": random.normal(size=(64, 4)) / 8}
    first = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), first)

    def loss(params, x, y):
        out = jnp.tanh(x @ params["up"]) @ params["down"]
        return jnp.mean(jnp.sum((out - y) ** 2, -1))

    def train(total):
        def body(carry, _, x, y):
            params, error = carry
            varying = jax.lax.pcast(params, "a", to="varying")
            gradient, error = total(jax.grad(loss)(varying, x, y), error)
            params = jax.tree.map(lambda p, g: p - rate / DEVICES * g, params, gradient)
            return (params, error), None

        def run(x, y):
            error = jax.lax.pcast(jax.tree.map(jnp.zeros_like, first), "a", to="varying")
            (params, _), _ = jax.lax.scan(partial(body, x=x, y=y), (first, error), None, steps)
            return params, loss(jax.lax.pcast(params, "a", to="varying"), x, y)[None]

        params, losses = per_device(run, ONE_AND_EACH)(x, y)
        return params, np.mean(losses)

    def distance(params):
        return np.sqrt(sum(np.sum((params[k] - exact[k]) ** 2) for k in exact))

    four = ArrayConfig(format=INT4, group_size=64)
    exact, least = train(lambda g, e: (jax.lax.psum(g, "a"), e))
    fed_back, in_4_bits = train(lambda g, e: quantized_psum(g, "a", four, error=e))
    without, beyond = train(lambda g, e: (quantized_psum(g, "a", four), e))
    assert least < 0.05 * np.mean([loss(first, *part) for part in zip(x, y, strict=True)])
    assert abs(in_4_bits / least - 1) < 0.01
    assert abs(beyond / least - 1) > 0.01
    assert distance(fed_back) < 0.2 * distance(without)


def test_equal_configs_share_one_compilation():
    traces = []

    @jax.jit
    def run(x, e, config):
        traces.append(1)
        return summed(config)(x, e)

    for seed in range(2):
        x = {"even": gradients(seed)["even"]}
        run(x, zeros_like(x), ArrayConfig(group_size=64))
    assert len(traces) == 1


def test_errors_keep_their_dtype():
    x = {"even": gradients()["even"]}
    error = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.bfloat16), x)
    total, rest = jax.eval_shape(summed(GRADIENT_8_BIT), x, error)
    assert (total["even"].dtype, rest["even"].dtype) == (jnp.float32, jnp.bfloat16)


FLOATS = jnp.zeros(512)
ERRORS = [
    (jnp.zeros(3, int), {}, r"floating-point arrays; got int32 of shape \(3,\).*jax.lax.psum"),
    ({"a": FLOATS}, {"error": {"b": FLOATS}}, r"error must be a tree like x, .*'a'.*got .*'b'"),
    (FLOATS, {"error": jnp.zeros(511)}, r"shapes \[\(512,\)\]; got .* of shapes \[\(511,\)\]"),
    (FLOATS, {"config": 8}, "config must be an ArrayConfig; got 8"),
    (
        FLOATS,
        {"config": ArrayConfig(group_size=(2, 2))},
        r"a single number of elements per block, .*got \(2, 2\)",
    ),
]


@pytest.mark.parametrize("x, options, text", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_got(x, options, text):
    with pytest.raises(ValueError, match=text):
        quantized_psum(x, "a", **options)
