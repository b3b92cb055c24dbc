"""Observers against their definitions, computed by NumPy over all observed elements."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import INT4, INT8, ArrayConfig, MinMSE, quantize
from jaxquant.core import quantize_with_range
from jaxquant.training import MovingAverage, MSEHistogram, PercentileHistogram, RunningAbsMax

from .. import checks

SYMMETRIC, ASYMMETRIC = ArrayConfig(), ArrayConfig(symmetric=False)
BINS = 4096
FIRST = {
    "abs_max": RunningAbsMax.init(),
    "average": MovingAverage.init(0.8),
    "percentile": PercentileHistogram.init(99.0, BINS),
    "mse": MSEHistogram.init(BINS),
}


def batches(sign=1):
    """Arrays of two shapes and dtypes and of varying size, heavy-tailed and off-center."""
    random = np.random.default_rng(0)
    shapes, sizes = [(64, 30), (3, 5, 11)] * 2, [0.1, 3.0, 40.0, 0.5]
    found = [
        (random.standard_t(4, shape) + 0.5) * size * sign
        for shape, size in zip(shapes, sizes, strict=True)
    ]
    found[1] = sign * np.abs(found[1]) + sign
    return [jnp.asarray(x, d) for x, d in zip(found, ["float32", "bfloat16"] * 2, strict=True)]


def update_all(observer, seen):
    for x in seen:
        observer = observer.update(x)
    return observer


def all_elements(seen):
    return np.concatenate([np.asarray(x, np.float32).ravel() for x in seen])


def ends(observer, config):
    return np.array([float(end) for end in observer.finish(config)])


@pytest.mark.parametrize("sign", [1, -1])
def test_running_abs_max_spans_all_elements(sign):
    x = all_elements(batches(sign))
    observer = update_all(RunningAbsMax.init(), batches(sign))
    np.testing.assert_array_equal(ends(observer, ASYMMETRIC), [x.min(), x.max()])
    np.testing.assert_array_equal(ends(observer, SYMMETRIC), np.abs(x).max() * np.array([-1, 1]))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_range_contains_zero(sign):
    x = sign * jnp.linspace(1.0, 2.0, 50)
    for name in ("abs_max", "average", "percentile"):
        low, high = ends(FIRST[name].update(x), ASYMMETRIC)
        assert (low, high)[sign > 0] == pytest.approx(sign * 2, rel=0.05)
        assert (low, high)[sign < 0] == 0


@pytest.mark.parametrize("decay, sign", [(0.0, 1), (0.8, 1), (0.8, -1)])
def test_moving_average_weights_batches_by_age(decay, sign):
    seen = batches(sign)
    weights = np.array([decay ** (len(seen) - 1.0 - i) for i in range(len(seen))])
    weights /= weights.sum()
    each = [np.asarray(x, np.float32) for x in seen]
    low = weights @ [min(x.min(), 0) for x in each]
    high = weights @ [max(x.max(), 0) for x in each]

    observer = update_all(MovingAverage.init(decay), seen)

    np.testing.assert_allclose(ends(observer, ASYMMETRIC), [low, high], rtol=1e-6)
    np.testing.assert_allclose(ends(observer, SYMMETRIC)[1], max(-low, high), rtol=1e-6)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("p", [75, 99, 100])
def test_percentile_matches_all_elements_within_one_bin(p):
    x = all_elements(batches())
    observer = update_all(PercentileHistogram.init(p, BINS), batches())
    width = 4 * np.abs(x).max() / BINS

    # Between two elements the bins are empty, so either neighbor is correct.
    def assert_near(end, values, percent):
        methods = ("lower", "higher")
        lower, upper = (np.percentile(values, percent, method=m) for m in methods)
        assert lower - width <= end <= upper + width

    low, high = ends(observer, ASYMMETRIC)
    assert_near(low, np.minimum(x, 0), 100 - p)
    assert_near(high, np.maximum(x, 0), p)
    assert_near(ends(observer, SYMMETRIC)[1], np.abs(x), p)


def test_counts_move_to_the_right_bins_when_the_limit_grows():
    seen = batches()
    observer = update_all(PercentileHistogram.init(bins=64), seen)
    limit = 2.0 ** (np.frexp(np.abs(all_elements(seen)).max())[1])
    want = np.histogram(all_elements(seen), 64, (-limit, limit))[0]
    assert float(observer.limit) == limit
    np.testing.assert_array_equal(observer.counts, want)


def test_percentile_interpolates_within_a_bin():
    x = jnp.linspace(0, 0.99, 100)
    observer = PercentileHistogram.init(62.5, bins=4).update(x)
    np.testing.assert_allclose(ends(observer, SYMMETRIC), [-0.625, 0.625], atol=0.01)
    np.testing.assert_allclose(ends(observer, ASYMMETRIC), [0, 0.625], atol=0.01)
    mirrored = PercentileHistogram.init(62.5, bins=4).update(-x)
    np.testing.assert_allclose(ends(mirrored, ASYMMETRIC), [-0.625, 0], atol=0.01)


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1.5e38, 3e38])
def test_histograms_of_the_smallest_and_largest_floats_are_finite(size):
    x = jnp.asarray([0.5, -0.25, 0.125], jnp.float32) * jnp.float32(size)
    observer = update_all(PercentileHistogram.init(100, 64), [x, x])
    assert np.isfinite(np.asarray(observer.limit))
    assert float(observer.counts.sum()) == 6
    want = np.array([-0.25, 0.5]) * size
    np.testing.assert_allclose(ends(observer, ASYMMETRIC), np.minimum(want, 2.0**126), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("format, symmetric", [(INT8, False), (INT4, True)], ids=str)
def test_mse_histogram_equals_min_mse_when_elements_are_bin_centers(format, symmetric):
    x = all_elements(batches())
    width = 2 * 2.0 ** (np.frexp(np.abs(x).max())[1]) / BINS
    x = ((np.floor(x / width) + 0.5) * width).astype(np.float32)
    config = ArrayConfig(format=format, symmetric=symmetric)

    observer = update_all(MSEHistogram.init(BINS), np.split(jnp.asarray(x), 2))

    whole = dataclasses.replace(config, per_tensor=True)
    best = quantize(jnp.asarray(x), dataclasses.replace(whole, range=MinMSE()))
    low, high = observer.finish(config)
    got = quantize_with_range(jnp.asarray(x), low, high, whole)
    np.testing.assert_allclose(got.scale, best.scale, rtol=1e-5)
    np.testing.assert_array_equal(checks.zero_point_of(got), checks.zero_point_of(best))


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", FIRST)
def test_observers_can_be_scanned_and_compile_once(name):
    seen = jnp.stack([batches()[0] * k for k in (1.0, 3.0, 0.5)])

    def update(observer, x):
        return observer.update(x), None

    scanned = jax.jit(lambda observer: jax.lax.scan(update, observer, seen)[0])(FIRST[name])
    one_by_one = update_all(FIRST[name], seen)
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    before = type(scanned).update._cache_size()
    update_all(scanned, seen)
    assert type(scanned).update._cache_size() == before


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_elements_raise_at_the_end(name, bad):
    x = batches()[0]
    observer = update_all(FIRST[name], [x, x.at[1, 2].set(bad), x])
    with pytest.raises(ValueError, match=r"must be finite; got a range of .* held NaN or Inf"):
        observer.finish(SYMMETRIC)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", FIRST)
def test_finish_without_data_raises(name):
    for seen in ([], [jnp.zeros((0, 2))], [jnp.zeros((64, 30))]):
        with pytest.raises(
            ValueError, match=r"must see a nonzero value before finish .* got a range"
        ):
            update_all(FIRST[name], seen).finish(SYMMETRIC)


@pytest.mark.parametrize("name", FIRST)
def test_empty_batches_change_nothing(name):
    empty = [jnp.zeros((0, 2))]
    seen = update_all(FIRST[name], batches()[:1])
    for a, b in zip(*map(jax.tree.leaves, (update_all(seen, empty), seen)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1; got 1"):
        MovingAverage.init(1)
    with pytest.raises(ValueError, match=r"p must be above 50 and at most 100.*got 40"):
        PercentileHistogram.init(40)
    for bins in (0, 1, 100):
        with pytest.raises(ValueError, match=rf"bins must be a power of two .*got {bins}"):
            MSEHistogram.init(bins)
