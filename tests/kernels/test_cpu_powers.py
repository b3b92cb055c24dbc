"""The native kernels for codes of power codebooks, where they were compiled."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import INT8, ArrayConfig, quantize
from jaxquant.core.noise import Seed
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
# Shape, blocks, and a window of some blocks: its shape and first element.
ARRAYS = [
    ((6, 70), (3, 1), (3, 70), (3, 0)),
    ((4, 6, 20), (2, 3, 4), (2, 3, 8), (2, 3, 4)),
    ((640,), (128,), (256,), (384,)),
    ((2, 3, 8, 34), (1, 3, 4, 1), (1, 3, 4, 16), (1, 0, 4, 18)),
    ((2, 1), (2, 1), (2, 1), (0, 0)),
]
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


@pytest.mark.some_rows(3)
@pytest.mark.parametrize("shape, blocks, window, starts", ARRAYS, ids=str)
@each_format
@by_all_instructions
def test_codes_and_values_are_those_of_numpy(shape, blocks, window, starts, format, instructions):
    if cpu.why_unsupported_blocks(shape, format):
        pytest.skip(cpu.why_unsupported_blocks(shape, format) or "")
    x = values(shape, blocks, format)
    for words in (None, WORDS.tolist()):
        seed = None if words is None else jnp.asarray(WORDS)
        codes, scale = jax.jit(
            lambda x, seed=seed: cpu.encode_powers(
                x, format, blocks, seed, instructions=instructions
            )
        )(x)
        index, is_near, scales = wanted(x, blocks, format, words)
        np.testing.assert_array_equal(scale, scales)
        found = indices(codes, format)
        assert np.all((found == index) | (is_near & (abs(found - index) <= 1)))
    entries = np.asarray(format.codebook)[found]
    exact = entries * oracles.repeat_groups(scales.astype(np.float64), shape)
    decode = jax.jit(
        lambda *given: cpu.decode_powers(
            codes, scale, format, blocks, window, given, instructions=instructions
        )
    )
    whole = cpu.decode_powers(codes, scale, format, blocks, instructions=instructions)
    np.testing.assert_allclose(whole, exact, rtol=6e-7)
    part = tuple(slice(s, s + n) for s, n in zip(starts, window, strict=True))
    np.testing.assert_array_equal(decode(*map(jnp.int32, starts)), np.asarray(whole)[part])

    # A window of another array with these codes, of other values: nothing else is written.
    within = jax.jit(
        lambda x, codes, scale: cpu.encode_powers(
            x, format, blocks, jnp.asarray(WORDS), (codes, scale), starts, instructions
        )
    )
    again, scale_again = within(x[part] / 4, codes, scale)
    expected = indices(codes, format)
    quarter, is_near, _ = wanted(x / 4, blocks, format, WORDS.tolist())
    expected[part] = quarter[part]
    is_inside = np.zeros(shape, bool)
    is_inside[part] = True
    differs = indices(again, format) != expected
    assert not np.any(differs & ~(is_near & is_inside))
    blocks_of_part = tuple(
        slice(s.start // b, s.stop // b) for s, b in zip(part, blocks, strict=True)
    )
    quartered = np.array(scale)
    factor = np.where(quartered[blocks_of_part] == 1, 1, 0.25)
    quartered[blocks_of_part] *= factor
    np.testing.assert_array_equal(scale_again, quartered)


@each_format
def test_codes_are_those_of_quantize(format):
    """Of 200,000 elements, on several threads: in the same program, nearly always."""
    shape, blocks = (256, 800), (128, 1)
    x = jnp.asarray(values(shape, blocks, format))
    seed = Seed(jnp.asarray(WORDS))
    config = ArrayConfig(format=format, group_size=128)
    for key, words in ((None, None), (seed, seed.words)):
        q: Any = quantize(x, config, 0, key)
        codes, scale = cpu.encode_powers(x, format, blocks, words)
        np.testing.assert_array_equal(scale, q.scale)
        differs = indices(codes, format) != indices(q.codes, format)
        assert np.mean(differs) < 2e-5
        found = cpu.decode_powers(q.codes, q.scale, format, blocks)
        np.testing.assert_allclose(found, q.dequantize(), rtol=3e-7)


def test_vmap_is_a_loop():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 64)), jnp.float32)
    words = jnp.asarray(np.arange(6, dtype=np.uint32).reshape(3, 2))

    def both(x, words):
        codes, scale = cpu.encode_powers(x, SIGNED_8, (4, 1), words)
        return codes, cpu.decode_powers(codes, scale, SIGNED_8, (4, 1), after=scale)

    codes, found = jax.vmap(both)(x, words)
    for i in range(3):
        np.testing.assert_array_equal(codes[i], both(x[i], words[i])[0])
        np.testing.assert_array_equal(found[i], both(x[i], words[i])[1])
    assert cpu.empty((3, 5), "float32", x).shape == (3, 5)


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
