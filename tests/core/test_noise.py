"""The noise of stochastic rounding: its definition, and that nothing shows a pattern."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.core.noise import uniform_noise

pytestmark = pytest.mark.usefixtures("quick_compilation")
SHAPE = (512, 1024)
DRAWN = SHAPE[0] * SHAPE[1]


def slow_noise(words, place):
    """The noise of one element, in Python integers."""
    bits = (place ^ words[0]) * 0xED5AD4BB % 2**32
    bits = (bits ^ bits >> 11) * 0xAC4C1B51 % 2**32
    bits = ((bits ^ bits >> 15) + words[1]) * 0x31848BAB % 2**32
    return (bits >> 8) / 2**24


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, 5, 2)], ids=str)
def test_noise_is_its_definition(shape):
    key = jax.random.key(3)
    words = jax.random.bits(key, (2,), jnp.uint32).tolist()
    wanted = [slow_noise(words, place) for place in range(int(np.prod(shape)))]
    for draw in (uniform_noise, jax.jit(uniform_noise, static_argnums=(1, 2))):
        found = draw(key, shape, jnp.float32)
        assert (found.shape, found.dtype) == (shape, jnp.float32)
        np.testing.assert_array_equal(np.ravel(found), np.array(wanted, np.float32))


@pytest.fixture(scope="module")
def draws():
    """Of keys as they come in training: one split, and folded in, from one seed."""
    keys = [*jax.random.split(jax.random.key(0)), jax.random.fold_in(jax.random.key(0), 1)]
    draw = jax.jit(lambda key: uniform_noise(key, SHAPE, jnp.float32))
    return [np.asarray(draw(key), np.float64) for key in keys]


def test_noise_is_uniform(draws):
    for noise in draws:
        assert 0 <= noise.min() < noise.max() < 1
        # By high bits and by low ones: four standard deviations of chi squared, about its mean.
        for part in (noise, noise * 2**16 % 1):
            counts = np.bincount((part * 256).astype(int).ravel(), minlength=256)
            chi = np.sum((counts - DRAWN / 256) ** 2) / (DRAWN / 256)
            assert abs(chi - 255) < 4 * np.sqrt(2 * 255)


def test_draws_are_independent(draws):
    """Neighbours along each axis, squares, and keys: four standard deviations of a correlation."""
    noise = draws[0] - 0.5
    others = {f"row + {n}": np.roll(noise, n, 0) for n in (1, 2, 256)}
    others |= {f"column + {n}": np.roll(noise, n, 1) for n in (1, 2, 32, 512)}
    others |= {f"key {i}": draw - 0.5 for i, draw in enumerate(draws[1:])}
    for name, other in others.items():
        for power in (1, 2):
            found = np.corrcoef((noise**power).ravel(), (other**power).ravel())[0, 1]
            assert abs(found) < 4 / np.sqrt(DRAWN), name


@pytest.mark.parametrize("apart", [1, 64, 80, 576, 2048, 8192, 65536])
def test_pairs_fill_a_square(draws, apart):
    """Chi squared of 16 x 16 cells: five standard deviations about its mean."""
    for noise in draws:
        cells = (noise.ravel() * 16).astype(int)
        counts = np.bincount(cells[:-apart] * 16 + cells[apart:], minlength=256)
        wanted = (DRAWN - apart) / 256
        chi = np.sum((counts - wanted) ** 2) / wanted
        assert abs(chi - 255) < 5 * np.sqrt(2 * 255)


def test_rows_and_columns_average_a_half(draws):
    for noise in draws:
        for axis in (0, 1):
            means = noise.mean(axis) - 0.5
            deviation = np.sqrt(1 / 12 / noise.shape[axis])
            assert np.abs(means).max() < 4.5 * deviation
            assert np.std(means) == pytest.approx(deviation, rel=0.15)


def test_noise_supports_more_than_2_32_elements():
    found = jax.eval_shape(lambda: uniform_noise(jax.random.key(0), (3, 2**17, 2**16), "float32"))
    assert found.shape == (3, 2**17, 2**16)
