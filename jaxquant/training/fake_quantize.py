"""Quantization that training can see through: rounded values, with gradients."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp

from ..core import ArrayConfig, Axes, QTensor, quantize, quantize_with_range, straight_through


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LearnedStep:
    """The step of a symmetric array as a parameter. A pytree with one leaf.

    Attributes:
        scale: float32, in the shape of the scales. Its sign does not count.

    Source: Esser et al. 2020 (LSQ), arXiv:1902.08153.
    """

    scale: jax.Array

    def span(self, config: ArrayConfig, size: int) -> tuple[jax.Array, ...]:
        """(low, high, scale, zero point) of an array of `size` elements, with gradients."""
        if not config.symmetric:
            raise ValueError(
                f"A LearnedStep is for symmetric=True; got {config!r}. Use a LearnedRange."
            )
        factor = gradient_factor(size / max(self.scale.size, 1), config)
        scale = scale_gradient(jnp.abs(self.scale), factor)
        high = scale * config.reach
        return -high, high, scale, jnp.zeros_like(scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LearnedRange:
    """The ends of the range of an asymmetric array as parameters. A pytree with two leaves.

    Attributes:
        low, high: float32, in the shape of the scales; positive lows and negative highs count as 0.

    Source: Bhalgat et al. 2020 (LSQ+), arXiv:2004.09576, with the two ends for parameters.
    """

    low: jax.Array
    high: jax.Array

    def span(self, config: ArrayConfig, size: int) -> tuple[jax.Array, ...]:
        """(low, high, scale, zero point) of an array of `size` elements, with gradients."""
        if config.symmetric:
            raise ValueError(
                f"A LearnedRange is for symmetric=False; got {config!r}. Use a LearnedStep."
            )
        qmin, qmax = config.bounds
        factor = gradient_factor(size / max(self.low.size, 1), config)
        low = scale_gradient(jnp.where(self.low > 0, 0, self.low), factor)
        high = scale_gradient(jnp.where(self.high < 0, 0, self.high), factor)
        scale = (high - low) / (qmax - qmin)
        scale = jnp.where(scale == 0, 1, scale)
        return low, high, scale, qmin - low / scale


@partial(jax.jit, static_argnames="axis")
def fake_quantize(
    x: jax.Array,
    config: ArrayConfig,
    axis: Axes = 0,
    learned: LearnedStep | LearnedRange | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The values that x has after quantization, with gradients for x and for what is learned.

        value = dequantize(quantize(x, config, axis))

        d value / d x = 1 inside the range, 0 where x is clipped

    A learned step s, with v = x / s and g = 1 / sqrt(n qmax) for n elements per step, has

        d value / d s = g (round(v) - v) inside, g qmin or g qmax where v is beyond them

    and a learned range (low, high) the derivatives of s = (high - low) / (qmax - qmin) and of the
    zero point qmin - low / s, rounding counting as the identity, with n (qmax - qmin) in g.

    Args:
        x: floating array.
        config, axis: as for `jaxquant.quantize`. If something is learned, its range is not used.
        learned: `LearnedStep` for a symmetric config, `LearnedRange` for an asymmetric one; None
            for the range of x by `config`, through which no gradient goes.
        key: random key for stochastic rounding; None rounds to nearest.

    Returns:
        Array of the shape and dtype of x.

    Raises:
        ValueError: as for `jaxquant.quantize`, or what is learned does not suit the config.

    Error: as for `jaxquant.quantize`; equal to its result, bit for bit.
    Source: straight-through estimator: Bengio et al. 2013, arXiv:1308.3432; LSQ: Esser et al. 2020,
        arXiv:1902.08153, eq. 1 to 3 and section 2.2; LSQ+: Bhalgat et al. 2020, arXiv:2004.09576.
    """
    return quantize_for_training(x, config, axis, learned, key).decode()


def quantize_for_training(
    x: jax.Array,
    config: ArrayConfig,
    axis: Axes = 0,
    learned: LearnedStep | LearnedRange | None = None,
    key: jax.Array | None = None,
) -> QTensor:
    """x as a QTensor whose `values` are `fake_quantize(x, config, axis, learned, key)`."""
    fixed = jax.lax.stop_gradient(x)
    if learned is None:
        q = quantize(fixed, config, axis, key)
        return dataclasses.replace(q, values=straight_through(x, q, config))
    if not isinstance(learned, LearnedStep | LearnedRange):
        raise ValueError(
            f"learned must be a LearnedStep, a LearnedRange or None; got {type(learned).__name__}. "
            "Wrap an array of steps: LearnedStep(steps)."
        )
    low, high, *parameters = learned.span(config, x.size)
    low, high = jax.lax.stop_gradient((low, high))
    q = quantize_with_range(fixed, low, high, config, axis, key)
    return dataclasses.replace(q, values=straight_through(x, q, config, *parameters, margin=False))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    """x, with a gradient that is multiplied by `factor`."""
    return x


@scale_gradient.defjvp
def _(factor, primals, tangents):
    return primals[0], tangents[0] * factor


def gradient_factor(count: float, config: ArrayConfig) -> float:
    """What the gradient of a step is multiplied by that `count` elements share.

    So a step moves in proportion to its size as fast as weights do (LSQ, section 2.2).
    """
    qmin, qmax = config.bounds
    return 1 / math.sqrt(max(count, 1) * (qmax if config.symmetric else qmax - qmin))
