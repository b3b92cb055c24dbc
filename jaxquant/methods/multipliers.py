"""The search for a multiplier of activations among candidates."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..core import ArrayConfig, Axes, quantize
from .method import Transformed, check_count
from .output_error import output_error
from .statistics import MeanSquare, SecondMoment, Statistic

# Smallest magnitude of a channel, relative to the largest, that counts.
_SMALLEST = 1e-4


def log_magnitude(x: jax.Array) -> jax.Array:
    """log(x / max(x)) of magnitudes (K,); those near zero are raised."""
    peak = jnp.max(x, initial=0)
    return jnp.log(jnp.maximum(x / jnp.where(peak > 0, peak, 1), _SMALLEST))


def exponents(grid: int) -> jax.Array:
    """1/grid, 2/grid, ..., 1, as a column (grid, 1)."""
    return jnp.arange(1, grid + 1, dtype=jnp.float32)[:, None] / grid


def best_multiplier(
    weight: jax.Array,
    logs: jax.Array,
    moment: jax.Array,
    config: ArrayConfig,
    axis: Axes,
    other_error: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Transformed:
    """The weight with the multiplier of the least squared error of the outputs, or with ones.

    Args:
        weight: (N, K) floating-point.
        logs: (candidates, K), logarithms of the multipliers up to a constant: each candidate is
            centred between its smallest and its largest. One whose error is NaN is not chosen.
        moment: of the activations, as for `output_error`.
        config, axis: as for `quantize`.
        other_error: (quantized weight in float32 (N, K), multiplier (K,)) -> squared error that
            is added to that of the weights; None for none.
    """
    wide = weight.astype(jnp.float32)
    logs = jnp.concatenate([jnp.zeros_like(logs[:1]), logs])
    centre = (jnp.max(logs, 1, keepdims=True) + jnp.min(logs, 1, keepdims=True)) / 2
    candidates = jnp.exp(logs - centre).astype(weight.dtype)

    def of_candidate(carry, multiplier):
        changed = (weight / multiplier[None]).astype(jnp.float32)
        decoded = quantize(changed, config, axis).dequantize()
        factor = multiplier.astype(jnp.float32)
        error = jnp.sum(output_error(decoded * factor[None] - wide, moment))
        return carry, error if other_error is None else error + other_error(decoded, factor)

    # One candidate at a time: all at once would take that many copies of the weight.
    _, errors = jax.lax.scan(of_candidate, None, candidates)
    best = candidates[jnp.argmin(jnp.where(jnp.isnan(errors), jnp.inf, errors))]
    return Transformed(weight / best[None], best)


def check_search(moment: type[Statistic], grid: int) -> None:
    """Raises unless the statistic can score errors of outputs, and the grid has points."""
    if moment not in (SecondMoment, MeanSquare):
        raise ValueError(f"moment must be SecondMoment or MeanSquare; got {moment!r}.")
    check_count("grid", grid, 1)
