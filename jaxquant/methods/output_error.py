"""By how much an error of the weights changes the outputs."""

import jax
import jax.numpy as jnp

# Differences of errors decide between candidates; TPUs round the operands to bfloat16 by default.
_PRECISION = jax.lax.Precision.HIGHEST


def output_error(error: jax.Array, moment: jax.Array) -> jax.Array:
    """E|dW x|^2 of each output, (N,): the diagonal of dW S dW^T.

    Args:
        error: dW, (N, K).
        moment: S = E[x x^T], (K, K); or its diagonal E[x^2], (K,), which ignores correlations.
    """
    return jnp.sum(weighted(error, moment) * error, 1)


def weighted(error: jax.Array, moment: jax.Array) -> jax.Array:
    """dW S, (N, K): half the gradient of the output error."""
    if moment.ndim == 1:
        return error * moment[None]
    return jnp.matmul(error, moment, precision=_PRECISION)
