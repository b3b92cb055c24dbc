"""The search for a multiplier of activations among candidates."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..core import ArrayConfig, Axes, quantize
from .method import Transformed
from .statistics import MeanSquare, SecondMoment, Statistic

# Smallest magnitude of a channel, relative to the largest, that counts.
_SMALLEST = 1e-4


def log_magnitude(x: jax.Array) -> jax.Array:
    """log(x / max(x)) of magnitudes (K,); those near zero are raised."""
    peak = jnp.max(x, initial=0)
    return jnp.log(jnp.maximum(x / jnp.where(peak > 0, peak, 1), _SMALLEST))


def best_multiplier(
    weight: jax.Array,
    logs: jax.Array,
    score: Callable[[jax.Array, jax.Array], jax.Array],
    config: ArrayConfig,
    axis: Axes,
) -> Transformed:
    """The weight with the multiplier of the lowest score; the first of equal ones.

    Args:
        weight: (N, K) floating-point.
        logs: (candidates, K), logarithms of the multipliers up to a constant: each candidate is
            centred between its smallest and its largest. The first must be constant. A candidate
            whose score is NaN is not chosen, unless it is the first.
        score: (quantized weight in float32 (N, K), multiplier (K,)) -> scalar.
        config, axis: as for `quantize`.
    """
    centre = (jnp.max(logs, 1, keepdims=True) + jnp.min(logs, 1, keepdims=True)) / 2
    candidates = jnp.exp(logs - centre).astype(weight.dtype)

    def of_candidate(carry, multiplier):
        changed = (weight / multiplier[None]).astype(jnp.float32)
        decoded = quantize(changed, config, axis).dequantize()
        return carry, score(decoded, multiplier.astype(jnp.float32))

    # One candidate at a time: all at once would take that many copies of the weight.
    _, scores = jax.lax.scan(of_candidate, None, candidates)
    best = candidates[jnp.argmin(jnp.where(jnp.isnan(scores), jnp.inf, scores))]
    return Transformed(weight / best[None], best)


def check_moment(moment: type[Statistic]) -> None:
    """Raises unless a statistic can score errors of outputs."""
    if moment not in (SecondMoment, MeanSquare):
        raise ValueError(f"moment must be SecondMoment or MeanSquare; got {moment!r}.")
