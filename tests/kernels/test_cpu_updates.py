"""The native kernel that updates arrays in blocks of codes, where it was compiled."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import INT8, ArrayConfig, QTensor, quantize
from jaxquant.core.noise import Seed
from jaxquant.jaxprs import Step
from jaxquant.kernels import cpu
from jaxquant.training.power_formats import GRADIENT_8, POSITIVE_4, POSITIVE_8, SIGNED_4, SIGNED_8

from .. import oracles
from ..core.test_noise import slow_noise

pytestmark = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=cpu.unavailable() or "is there"
)
GRADIENT_INT8 = dataclasses.replace(GRADIENT_8, name="signed_squares_int8", dtype="int8")
FORMATS = {f.name: f for f in (SIGNED_8, POSITIVE_8, SIGNED_4, POSITIVE_4, GRADIENT_INT8)}
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
by_all_instructions = pytest.mark.parametrize("instructions", cpu.instruction_sets() or (None,))
# Shape and blocks: in one tile or several, of whole vectors or not.
ARRAYS = [
    ((6, 70), (3, 1)),
    ((4, 6, 20), (2, 3, 4)),
    ((640,), (128,)),
    ((2, 3, 8, 34), (1, 3, 4, 1)),
    ((2, 1), (2, 1)),
    ((2, 1602), (2, 3)),
]
update_blocks: Any = cpu.update_blocks
WORDS = np.array([0x12345678, 0x9ABCDEF0], np.uint32)
# Between two codes, in units of their distance: what float32 may round to the other one.
NEAR = 1e-4


def values(shape, blocks, format):
    """Of all magnitudes, with a block of zeros, subnormals and a block with NaN."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=shape) * 10.0 ** rng.uniform(-5, 2, shape)).astype(np.float32)
    first, last = (tuple(slice(b) for b in blocks), tuple(slice(-b, None) for b in blocks))
    if shape != blocks:
        x[first] = np.where(rng.random(blocks) < 0.5, 0, 1e-39)
        x[last].flat[0] = np.nan if len(shape) % 2 else np.inf
    return x if format.has_negative else np.abs(x)


def wanted(x, blocks, format, words):
    """(codes as indices of the codebook, whether float32 may choose a neighbor, scales)."""
    counts = [n // b for n, b in zip(x.shape, blocks, strict=True)]
    book, index = np.asarray(format.codebook), np.zeros(x.shape, int)
    scale, is_near = np.zeros(counts, np.float32), np.zeros(x.shape, bool)
    flushed = np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x)
    for at in np.ndindex(*counts):
        place = tuple(slice(i * b, i * b + b) for i, b in zip(at, blocks, strict=True))
        peak = np.max(np.abs(flushed[place]))
        scale[at] = np.nan if not np.isfinite(peak) else peak or 1
        for inner in np.ndindex(*blocks):
            element = tuple(i * b + j for i, b, j in zip(at, blocks, inner, strict=True))
            value = 0.0 if np.isnan(scale[at]) else np.float64(flushed[element]) / scale[at]
            # Away from zero, by the fraction of the way to the next entry.
            side = book[book >= 0] if value >= 0 else -book[book <= 0][::-1]
            i = min(np.searchsorted(side, abs(value), "right") - 1, len(side) - 2)
            part = (
                0.5
                if words is None
                else slow_noise(words, int(np.ravel_multi_index(element, x.shape)))
            )
            fraction = (abs(value) - side[i]) / (side[i + 1] - side[i])
            i += fraction > part
            is_near[element] = min(abs(fraction - part), abs(fraction - 1)) < NEAR
            if not format.has_negative and value > 0:
                i = max(i, 1)
            zero = len(book) // 2 if format.has_negative else 0
            index[element] = zero + (i if value >= 0 else -i)
    return index, is_near, scale


def indices(codes, format):
    return np.asarray(codes).astype(int) % 2**format.bits


def empty(shape, blocks, format):
    """An array to be overwritten."""
    counts = [n // b for n, b in zip(shape, blocks, strict=True)]
    codes = jnp.zeros(shape, format.dtype)
    return QTensor(codes, jnp.ones(counts), format=format, dtype=np.dtype(np.float32))


def encode(x, blocks, format, words=None, instructions=None) -> Any:
    """x as a QTensor."""
    step = Step("copy", 2, (0,))
    inputs = x, empty(x.shape, blocks, format)
    seeds = None if words is None else [words]
    return update_blocks([step], inputs, [], [1], seeds, instructions=instructions)[0]


def decode(q, after=None, instructions=None):
    step = Step("copy", 1, (0,))
    outputs = [jnp.float32]
    return update_blocks([step], [q], [], outputs, after=after, instructions=instructions)[0]


@pytest.mark.some_rows(3)
@pytest.mark.parametrize("shape, blocks", ARRAYS, ids=str)
@each_format
@by_all_instructions
def test_codes_and_values_are_those_of_numpy(shape, blocks, format, instructions):
    if cpu.why_unsupported_blocks(shape, format):
        pytest.skip(cpu.why_unsupported_blocks(shape, format) or "")
    x = values(shape, blocks, format)
    for words in (None, WORDS):
        q = jax.jit(lambda x, words=words: encode(x, blocks, format, words, instructions))(x)
        index, is_near, scales = wanted(
            x, blocks, format, None if words is None else words.tolist()
        )
        np.testing.assert_array_equal(q.scale, scales)
        found = indices(q.codes, format)
        assert np.all((found == index) | (is_near & (abs(found - index) <= 1)))
    entries = np.asarray(format.codebook)[found]
    exact = entries * oracles.repeat_groups(scales.astype(np.float64), shape)
    np.testing.assert_allclose(decode(q, instructions=instructions), exact, rtol=6e-7)


@each_format
def test_codes_are_those_of_quantize(format):
    """Of 200,000 elements, on several threads: in the same program, nearly always."""
    shape, blocks = (256, 800), (128, 1)
    x = jnp.asarray(values(shape, blocks, format))
    seed = Seed(jnp.asarray(WORDS))
    config = ArrayConfig(format=format, group_size=128)
    for key, words in ((None, None), (seed, seed.words)):
        q: Any = quantize(x, config, 0, key)
        found = encode(x, blocks, format, words)
        np.testing.assert_array_equal(found.scale, q.scale)
        differs = indices(found.codes, format) != indices(q.codes, format)
        assert np.mean(differs) < 2e-5
        np.testing.assert_allclose(decode(q), q.dequantize(), rtol=3e-7)


def test_infinite_scales_give_nan():
    q = encode(jnp.ones((4, 64)), (4, 1), SIGNED_8)
    broken = dataclasses.replace(q, scale=q.scale.at[0, 3].set(-jnp.inf))
    assert np.isnan(decode(broken)).sum(0).tolist() == [4 * (i == 3) for i in range(64)]


ROW = np.array([-3, -1.5, -0.0, 0, 0.5, 2, 7, np.inf, np.nan], np.float32)
OTHER = np.array([2, -1.5, 1, 0, -np.inf, np.nan, 7, 1, 2], np.float32)
OPERATIONS: dict[str, Any] = {
    "copy": lambda x: x,
    "negate": np.negative,
    "magnitude": np.abs,
    "root": np.sqrt,
    "sign": np.sign,
    "round_to_bfloat16": lambda x: x.astype(jnp.bfloat16).astype(np.float32),
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": np.equal,
    "less": np.less,
    "less_or_equal": np.less_equal,
    "select": lambda which, x, y: np.where(which != 0, y, x),
    "combine": lambda x, a, y, b: x * a + y * b,
}

UNARY = "copy", "negate", "magnitude", "root", "sign", "round_to_bfloat16"


@by_all_instructions
@pytest.mark.parametrize("name", cpu.OPERATIONS)
def test_operations_are_those_of_numpy(name, instructions):
    """Of rows and scalars, in each place that may have one."""
    rng = np.random.default_rng(0)
    rows = [np.concatenate([x, rng.normal(size=91).astype(np.float32)]) for x in (ROW, OTHER)]
    pairs = [(0, 1), (0, -1), (-1, 1)]
    others = {
        **{key: [(0,)] for key in UNARY},
        "select": [(0, 1, 0), (0, -1, 1), (-1, 0, 1), (0, -1, -2)],
        "combine": [(0, -1, 1, -2)],
    }
    scalars = np.float32(1.7), np.float32(-0.3)
    q = encode(jnp.ones((1, 100)), (1, 100), SIGNED_8)
    for operands in others.get(name, pairs):
        inputs = [*(jnp.asarray(x)[None] for x in rows), q]
        step = Step(name, 3, operands)
        found = update_blocks(
            [step],
            inputs,
            [jnp.asarray(s) for s in scalars],
            [jnp.float32],
            instructions=instructions,
        )
        given = [rows[i] if i >= 0 else scalars[-1 - i] for i in operands]
        with np.errstate(all="ignore"):
            exact = np.broadcast_to(OPERATIONS[name](*given), 100).astype(np.float32)
        # Products are fused with sums or not.
        np.testing.assert_allclose(found[0][0], exact, rtol=2e-7, atol=1e-6 * (name == "combine"))


def test_several_outputs_of_all_kinds_and_many_steps():
    """bfloat16 in and out, codes in place of others' codes, and rows between, under `jit`."""
    rng = np.random.default_rng(1)
    shape, blocks = (8, 130), (4, 1)
    x, y = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    narrow = jnp.asarray(y, jnp.bfloat16)
    q, positive = encode(x, blocks, SIGNED_8), encode(np.abs(y), blocks, POSITIVE_8)

    @jax.jit
    def run(narrow, q, positive, scale):
        # Slots: narrow, q, positive; a sum, a half, two arrays of codes; and one between.
        steps = [
            Step("multiply", 7, (1, -1)),
            Step("add", 3, (7, 0)),
            Step("copy", 4, (3,)),
            Step("subtract", 5, (1, 2)),
            Step("magnitude", 6, (5,)),
        ]
        outputs = [jnp.float32, jnp.bfloat16, 1, 2]
        return update_blocks(steps, [narrow, q, positive], [scale], outputs)

    found, half, signed, unsigned = run(narrow, q, positive, 3.0)
    total = 3 * decode(q) + narrow.astype(jnp.float32)
    np.testing.assert_allclose(found, total, rtol=1e-6, atol=1e-6)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), found, rtol=2**-8)
    difference = decode(q) - decode(positive)
    for q, exact in ((signed, difference), (unsigned, jnp.abs(difference))):
        expected = encode(exact, blocks, q.format)
        np.testing.assert_allclose(q.scale, expected.scale, rtol=1e-6)
        assert np.mean(indices(q.codes, q.format) != indices(expected.codes, q.format)) < 0.01


def test_vmap_is_a_loop():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 64)), jnp.float32)
    words = jnp.asarray(np.arange(6, dtype=np.uint32).reshape(3, 2))

    def both(x, words):
        q = encode(x, (4, 1), SIGNED_8, words)
        return q.codes, decode(q, after=q.scale)

    codes, found = jax.vmap(both)(x, words)
    for i in range(3):
        np.testing.assert_array_equal(codes[i], both(x[i], words[i])[0])
        np.testing.assert_array_equal(found[i], both(x[i], words[i])[1])


UNSUPPORTED = [
    ((), SIGNED_8, "empty or a scalar"),
    ((0, 4), SIGNED_8, "empty"),
    ((4, 3), SIGNED_4, "rows of 3 4-bit codes"),
    ((4, 3), INT8, "int8 has no codebook of powers"),
    ((4, 3), dataclasses.replace(SIGNED_8, qmax=0.5), "not use all of its codebook"),
    ((4, 3), dataclasses.replace(SIGNED_8, dtype="uint16"), "codes of 16 bits"),
]


@pytest.mark.parametrize("shape, format, text", UNSUPPORTED, ids=str)
def test_unsupported_arrays_have_a_reason(shape, format, text):
    assert text in (cpu.why_unsupported_blocks(shape, format) or "")
    assert cpu.why_unsupported_blocks((4, 3), SIGNED_8) is None
