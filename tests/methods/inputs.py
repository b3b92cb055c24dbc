"""Weights and activations for the tests of methods."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.methods import MaxAbs, MeanAbs, MeanSquare, SecondMoment

KINDS = (MeanAbs, MaxAbs, MeanSquare, SecondMoment)


def weights(shape=(9, 24), seed=0):
    """Normal weights (N, K) whose rows differ in size."""
    random = np.random.default_rng(seed)
    sizes = np.exp(0.5 * random.normal(size=(shape[0], 1)))
    return (random.normal(size=shape) * sizes).astype(np.float32)


def activations(channels=24, seed=0, spread=1.0, rows=200):
    """Correlated activations (rows, K) whose channels differ in size."""
    random = np.random.default_rng(seed + 1)
    x = random.normal(size=(rows, channels))
    for k in range(1, channels):
        x[:, k] = 0.8 * x[:, k - 1] + 0.6 * x[:, k]
    return (x * np.exp(spread * random.normal(size=channels))).astype(np.float32)


def means_of(x) -> dict[Any, Any]:
    """Each statistic's mean over rows, by class."""
    return {kind: kind.init(x.shape[1]).update(jnp.asarray(x)).finish() for kind in KINDS}


def nan_means(channels=24) -> dict[Any, Any]:
    """Means of no rows."""
    return {kind: kind.init(channels).finish() for kind in KINDS}


def output_error(error, x):
    """The mean squared error of outputs in float64, per output."""
    outputs = np.asarray(x, np.float64) @ np.asarray(error, np.float64).T
    return np.mean(outputs**2, 0)


def transform(method, *args) -> Any:
    """`method.transform(*args)`, of a transform that always has a multiplier."""
    changed = method.transform(*args)
    assert changed.multiplier is not None
    assert changed.rotation is None
    return changed
