"""The arithmetic of delayed scaling: histories of amax, the largest magnitude of an array."""

import jax
import jax.numpy as jnp

from ..core import largest_magnitude


def amax_of(x: jax.Array) -> jax.Array:
    """max|x| in float32: 0 if x is empty, inf if any element is not finite."""
    return largest_magnitude(x.astype(jnp.float32), tuple(range(x.ndim))).reshape(())


def push_amax(history: jax.Array, amax: jax.Array) -> jax.Array:
    """The history with the amax of one more step, newest first: (..., length) and (...).

    A non-finite amax says nothing about the next step and is recorded as 0, "not observed".
    """
    newest = jnp.where(jnp.isfinite(amax), amax, 0)
    return jnp.roll(history, 1, -1).at[..., 0].set(newest)


def limit_from_history(history: jax.Array, amax: jax.Array) -> jax.Array:
    """The magnitude to expect: max(history), or amax while the history is all zeros."""
    largest = jnp.max(history)
    return jnp.where(largest > 0, largest, amax)
