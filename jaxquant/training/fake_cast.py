"""Casts to float8 and back with delayed scaling, for layers that keep a scale per operand.

They are for frameworks that overwrite a variable with its gradient, as Keras does: the backward
pass returns the next scale and the next history in the gradient slots. (JAX adds up the gradients
of a layer that runs twice in one step, so such a layer cannot be trained this way.)

Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3.1.
"""

import jax
import jax.numpy as jnp

from .amax import amax_of, push_amax

FORWARD = "float8_e4m3fn"
BACKWARD = "float8_e5m2"


def scale_from_amax(amax: jax.Array, otherwise: jax.Array, dtype: str) -> jax.Array:
    """amax / (largest value of the dtype), or `otherwise` if amax is zero or not finite."""
    is_known = (amax > 0) & jnp.isfinite(amax)
    # At least the smallest normal float32: a subnormal step would be flushed to 0.
    step = jnp.maximum(amax / float(jnp.finfo(dtype).max), jnp.finfo(jnp.float32).tiny)
    return jnp.where(is_known, step, otherwise)


def current_scale(x: jax.Array, scale: jax.Array, history: jax.Array, dtype: str) -> jax.Array:
    """The given scale, or that of x itself while the history is empty."""
    is_empty = jnp.max(history) == 0
    return jnp.where(is_empty, scale_from_amax(amax_of(x), scale, dtype), scale)


def next_scaling(
    x: jax.Array, scale: jax.Array, history: jax.Array, dtype: str
) -> tuple[jax.Array, jax.Array]:
    """The scale and the history for the next step, given the x of this step."""
    history = push_amax(history, amax_of(x))
    return scale_from_amax(jnp.max(history), scale, dtype), history


def fake_cast(x: jax.Array, scale: jax.Array, dtype: str) -> jax.Array:
    """x rounded to a float8 dtype in units of scale, saturating, in the dtype of x.

    NaN and Inf stay visible: they become NaN, or Inf in a dtype that has it.
    """
    values = x.astype(jnp.float32) / scale
    largest = float(jnp.finfo(dtype).max)
    clipped = jnp.where(jnp.isfinite(values), jnp.clip(values, -largest, largest), values)
    return (clipped.astype(dtype).astype(jnp.float32) * scale).astype(x.dtype)


def cast_operand(x: jax.Array, scale: jax.Array, history: jax.Array) -> jax.Array:
    """Casts an operand of the forward pass to e4m3 and back.

    Args:
        x: float array.
        scale: float32 scalar; its gradient slot returns the next scale.
        history: float32 (length,); its gradient slot returns the next history.

    Returns:
        Array of the shape and dtype of x; gradients pass to x unchanged.
    """
    return _cast_operand(x, scale, history)


@jax.custom_vjp
def _cast_operand(x, scale, history):
    return fake_cast(x, current_scale(x, scale, history, FORWARD), FORWARD)


def _operand_forward(x, scale, history):
    return _cast_operand(x, scale, history), next_scaling(x, scale, history, FORWARD)


def _operand_backward(scaling, gradient):
    return gradient, *scaling


_cast_operand.defvjp(_operand_forward, _operand_backward)


def cast_gradient(y: jax.Array, scale: jax.Array, history: jax.Array) -> jax.Array:
    """Returns y unchanged; its gradient is cast to e5m2 and back.

    Arguments and their gradient slots are those of `cast_operand`.
    """
    return _cast_gradient(y, scale, history)


@jax.custom_vjp
def _cast_gradient(y, scale, history):
    return y


def _gradient_forward(y, scale, history):
    return y, (scale, history)


def _gradient_backward(scaling, gradient):
    scale, history = scaling
    rounded = fake_cast(gradient, current_scale(gradient, scale, history, BACKWARD), BACKWARD)
    return rounded, *next_scaling(gradient, scale, history, BACKWARD)


_cast_gradient.defvjp(_gradient_forward, _gradient_backward)
