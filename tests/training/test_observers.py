"""Observers against their definitions, in NumPy over everything that was observed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import INT4, INT8, ArrayConfig, MinMSE, quantize
from jaxquant.training import MovingAverage, MSEHistogram, PercentileHistogram, RunningAbsMax

pytestmark = pytest.mark.usefixtures("quick_compilation")

SYMMETRIC, ASYMMETRIC = ArrayConfig(), ArrayConfig(symmetric=False)
BINS = 4096
FIRST = {
    "abs_max": RunningAbsMax.init(),
    "average": MovingAverage.init(0.8),
    "percentile": PercentileHistogram.init(99.0, BINS),
    "mse": MSEHistogram.init(BINS),
}


def batches(shift=0.5):
    """Of several shapes and dtypes, growing and shrinking, with heavy tails and off zero."""
    random = np.random.default_rng(0)
    shapes, sizes = [(64, 30), (7,), (3, 5, 11), (640, 3)], [0.1, 3.0, 40.0, 0.5]
    found = [
        (random.standard_t(4, shape) + shift) * size
        for shape, size in zip(shapes, sizes, strict=True)
    ]
    return [jnp.asarray(x, d) for x, d in zip(found, ["float32", "bfloat16"] * 2, strict=True)]


def observed(observer, seen):
    for x in seen:
        observer = observer.update(x)
    return observer


def everything(seen):
    return np.concatenate([np.asarray(x, np.float32).ravel() for x in seen])


def ends(observer, config):
    return np.array([float(end) for end in observer.finish(config)])


def test_running_abs_max_spans_all_that_was_seen():
    x = everything(batches())
    observer = observed(RunningAbsMax.init(), batches())
    np.testing.assert_array_equal(ends(observer, ASYMMETRIC), [x.min(), x.max()])
    np.testing.assert_array_equal(ends(observer, SYMMETRIC), np.abs(x).max() * np.array([-1, 1]))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_range_holds_zero(sign):
    x = sign * jnp.linspace(1.0, 2.0, 50)
    for name in ("abs_max", "average", "percentile"):
        low, high = ends(FIRST[name].update(x), ASYMMETRIC)
        assert (low, high)[sign > 0] == pytest.approx(sign * 2, rel=0.05)
        assert (low, high)[sign < 0] == 0


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_moving_average_weighs_batches_by_their_age(decay):
    seen = batches()
    weights = np.array([decay ** (len(seen) - 1.0 - i) for i in range(len(seen))])
    weights /= weights.sum()
    each = [np.asarray(x, np.float32) for x in seen]
    low = weights @ [min(x.min(), 0) for x in each]
    high = weights @ [max(x.max(), 0) for x in each]

    observer = observed(MovingAverage.init(decay), seen)

    np.testing.assert_allclose(ends(observer, ASYMMETRIC), [low, high], rtol=1e-6)
    np.testing.assert_allclose(ends(observer, SYMMETRIC)[1], max(-low, high), rtol=1e-6)


@pytest.mark.parametrize("p", [75, 99, 100])
def test_percentile_is_that_of_all_elements_within_a_bin(p):
    x = everything(batches())
    observer = observed(PercentileHistogram.init(p, BINS), batches())
    width = 4 * np.abs(x).max() / BINS

    # Halfway to the next element there is nothing in the bins: so one of the two.
    def assert_near(end, values, percent):
        methods = ("lower", "higher")
        lower, upper = (np.percentile(values, percent, method=m) for m in methods)
        assert lower - width <= end <= upper + width

    low, high = ends(observer, ASYMMETRIC)
    assert_near(low, np.minimum(x, 0), 100 - p)
    assert_near(high, np.maximum(x, 0), p)
    assert_near(ends(observer, SYMMETRIC)[1], np.abs(x), p)


def test_counts_stay_where_they_belong_as_the_limit_grows():
    seen = batches()
    observer = observed(PercentileHistogram.init(bins=64), seen)
    limit = 2.0 ** (np.frexp(np.abs(everything(seen)).max())[1])
    want = np.histogram(everything(seen), 64, (-limit, limit))[0]
    assert float(observer.limit) == limit
    np.testing.assert_array_equal(observer.counts, want)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", [INT8, INT4], ids=str)
def test_mse_is_as_good_as_the_search_over_all_elements(format, symmetric):
    x = jnp.asarray(everything(batches()))
    config = ArrayConfig(format=format, axis=None, symmetric=symmetric)
    observer = observed(MSEHistogram.init(BINS), batches())

    def error(low, high):
        steps = (high - low) / (config.bounds[1] - config.bounds[0])
        return np.mean(np.square(np.clip(np.round(x / steps) * steps, low, high) - x))

    best = quantize(x, ArrayConfig(format=format, axis=None, symmetric=symmetric, range=MinMSE()))
    zero = 0 if best.zero_point is None else float(best.zero_point[0])
    limits = [(q - zero) * float(best.scale[0]) for q in config.bounds]
    high = ends(observer, config)[1]
    low = ends(observer, config)[0] if not symmetric else high / config.bounds[1] * config.bounds[0]
    assert error(low, high) <= 1.02 * error(*limits)


@pytest.mark.parametrize("name", FIRST)
def test_observers_are_carried_by_scan_and_compiled_once(name):
    seen = jnp.stack([batches()[0] * k for k in (1.0, 3.0, 0.5)])

    def update(observer, x):
        return observer.update(x), None

    scanned = jax.jit(lambda observer: jax.lax.scan(update, observer, seen)[0])(FIRST[name])
    one_by_one = observed(FIRST[name], seen)
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    before = type(scanned).update._cache_size()
    observed(scanned, seen)
    assert type(scanned).update._cache_size() == before


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_forgotten(name, bad):
    x = batches()[0]
    observer = observed(FIRST[name], [x, x.at[1, 2].set(bad), x])
    with pytest.raises(ValueError, match=r"must be finite; got a range of .* held NaN or Inf"):
        observer.finish(SYMMETRIC)


@pytest.mark.parametrize("name", FIRST)
def test_an_observer_that_saw_nothing_has_no_range(name):
    for seen in ([], [jnp.zeros(3)], [jnp.zeros((0, 2))]):
        with pytest.raises(
            ValueError, match=r"must have seen something beside zeros .* got a range"
        ):
            observed(FIRST[name], seen).finish(SYMMETRIC)


def test_zeros_and_empty_batches_change_no_range():
    seen = batches()
    zeros = [jnp.zeros((0, 2)), jnp.zeros(0)]
    for observer in (FIRST["abs_max"], FIRST["percentile"]):
        want = ends(observed(observer, seen), ASYMMETRIC)
        np.testing.assert_array_equal(ends(observed(observer, zeros + seen), ASYMMETRIC), want)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1; got 1"):
        MovingAverage.init(1)
    with pytest.raises(ValueError, match=r"p must be above 50 and at most 100.*got 40"):
        PercentileHistogram.init(40)
    for bins in (0, 1, 100):
        with pytest.raises(ValueError, match=rf"bins must be a power of two .*got {bins}"):
            MSEHistogram.init(bins)
