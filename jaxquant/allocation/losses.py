"""Losses whose gradients say how much a model's outputs depend on each product."""

from typing import Any

import jax
import jax.numpy as jnp


def sampled_token(outputs: jax.Array, key: jax.Array) -> jax.Array:
    """The log-probabilities of tokens that the model itself predicts, summed: for logits (..., V).

    The expected square of their derivative is twice the Kullback-Leibler divergence that a small
    change causes (the Fisher information), so no labels are needed.

    Args:
        outputs: logits.
        key: random key, for the samples.

    Raises:
        ValueError: the outputs are not one floating-point array with an axis of classes.

    Source: Kunstner et al. 2019, arXiv:1905.12558, section 2.

    Example:
        >>> logits = jnp.array([[0.0, 100.0], [100.0, 0.0]])
        >>> float(jq.allocation.sampled_token(logits, jax.random.key(0)))
        0.0
    """
    is_array = hasattr(outputs, "dtype") and jnp.issubdtype(outputs.dtype, jnp.floating)
    if not is_array or outputs.ndim < 1 or outputs.shape[-1] < 2:
        raise ValueError(
            "sampled_token needs logits, one floating-point array (..., classes); got "
            f"{jax.tree.map(jnp.shape, outputs)}. Return the logits from apply, or pass "
            "loss=jq.allocation.random_projection or a loss of your own."
        )
    logits = outputs.astype(jnp.float32)
    token = jax.random.categorical(key, jax.lax.stop_gradient(logits))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], -1)
    return jnp.sum(chosen)


def random_projection(outputs: Any, key: jax.Array) -> jax.Array:
    """A random sum of all outputs: for models without logits, such as encoders.

        sum over outputs of v * outputs,    v ~ N(0, 1) for each element

    The expected square of its derivative is the squared change of the outputs.

    Args:
        outputs: pytree of arrays; floating-point ones count.
        key: random key, for v.

    Raises:
        ValueError: no output is a floating-point array.

    Source: Hutchinson 1990, A stochastic estimator of the trace.

    Example:
        >>> outputs = {"vectors": jnp.ones((2, 3)), "ids": jnp.arange(2)}
        >>> jq.allocation.random_projection(outputs, jax.random.key(0)).shape
        ()
    """
    leaves = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not leaves:
        raise ValueError(
            "random_projection needs floating-point outputs; got "
            f"{jax.tree.map(lambda x: x.dtype.name, outputs)}."
        )
    keys = jax.random.split(key, len(leaves))
    return sum(
        (
            jnp.sum(jax.random.normal(k, x.shape) * x.astype(jnp.float32))
            for k, x in zip(keys, leaves, strict=True)
        ),
        start=jnp.float32(0),
    )
