"""Fake quantization: quantized values with straight-through gradients (QAT, STE, LSQ)."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ..core import (
    ArrayConfig,
    Axes,
    QTensor,
    check_axis,
    quantize,
    quantize_with_range,
    straight_through,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LearnedStep:
    """A trainable quantization step (LSQ) for a symmetric array. A pytree with one leaf.

    Attributes:
        scale: float32, in the shape of the scales. Its sign is ignored.

    Source: Esser et al. 2020 (LSQ), arXiv:1902.08153.

    Example:
        >>> step = jq.training.LearnedStep(jnp.full((1, 2), 0.5))
        >>> jq.training.fake_quantize(jnp.full((4, 2), 0.6), jq.ArrayConfig(), 0, step)[0].tolist()
        [0.5, 0.5]
    """

    scale: jax.Array

    def span(self, config: ArrayConfig, size: int) -> tuple[jax.Array, ...]:
        """Returns (low, high, scale, zero point) for `size` elements, with gradients."""
        if not config.symmetric:
            raise ValueError(
                f"A LearnedStep needs symmetric=True; got {config!r}. Use a LearnedRange."
            )
        factor = gradient_factor(size / max(self.scale.size, 1), config)
        scale = scale_gradient(jnp.abs(self.scale), factor)
        high = scale * config.symmetric_qmax
        return -high, high, scale, jnp.zeros_like(scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LearnedRange:
    """A trainable range (LSQ+) for an asymmetric array. A pytree with two leaves.

    Attributes:
        low, high: float32, in the shape of the scales; a positive low or negative high counts as 0.

    Source: Bhalgat et al. 2020 (LSQ+), arXiv:2004.09576, with the two ends as parameters.

    Example:
        >>> range = jq.training.LearnedRange(jnp.zeros((1, 1)), jnp.full((1, 1), 254.0))
        >>> config = jq.ArrayConfig(symmetric=False)
        >>> jq.training.fake_quantize(jnp.full((4, 1), 7.3), config, 0, range)[0].tolist()
        [7.0]
    """

    low: jax.Array
    high: jax.Array

    def span(self, config: ArrayConfig, size: int) -> tuple[jax.Array, ...]:
        """Returns (low, high, scale, zero point) for `size` elements, with gradients."""
        if config.symmetric:
            raise ValueError(
                f"A LearnedRange needs symmetric=False; got {config!r}. Use a LearnedStep."
            )
        qmin, qmax = config.bounds
        factor = gradient_factor(size / max(self.low.size, 1), config)
        low = scale_gradient(jnp.where(self.low > 0, 0, self.low), factor)
        high = scale_gradient(jnp.where(self.high < 0, 0, self.high), factor)
        scale = (high - low) / (qmax - qmin)
        scale = jnp.where(scale == 0, 1, scale)
        return low, high, scale, qmin - low / scale


def fake_quantize(
    x: jax.Array | np.ndarray,
    config: ArrayConfig,
    axis: Axes = 0,
    learned: LearnedStep | LearnedRange | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Quantizes and dequantizes x, with gradients for x and for a learned step or range.

        value = dequantize(quantize(x, config, axis))

        d value / d x = 1 inside, 0 where x is clipped        (straight-through estimator)

    Without `learned`, an element counts as inside if it lies beyond the outermost code by at most
    half of the outermost step: for integer codes, qmin - 1/2 <= x / s + zero_point <= qmax + 1/2.
    So rounding never costs the largest element of a group its gradient. With `learned`, only
    elements from qmin to qmax are inside, as in LSQ.

    A learned step s, with v = x / s and g = 1 / sqrt(n qmax) for n elements per step, gets

        d value / d s = g (round(v) - v) inside, g qmin below qmin, g qmax above qmax

    A learned range (low, high) gets the derivatives of s = (high - low) / (qmax - qmin) and of the
    zero point qmin - low / s, with rounding as the identity and n (qmax - qmin) in g.

    Args:
        x: floating-point array.
        config, axis: as for `jaxquant.quantize`. With `learned`, config.range is not used.
        learned: `LearnedStep` for a symmetric config, `LearnedRange` for an asymmetric one; None
            to compute the range of x by `config`, without a gradient through it.
        key: random key for stochastic rounding; None rounds to nearest.

    Returns:
        Array of the shape and dtype of x.

    Raises:
        ValueError: as for `jaxquant.quantize`, or `learned` does not fit the config.

    Error: as for `jaxquant.quantize`; the values equal its result bit for bit.
    Source: straight-through estimator: Bengio et al. 2013, arXiv:1308.3432; LSQ: Esser et al. 2020,
        arXiv:1902.08153, eq. 1 to 3 and section 2.2; LSQ+: Bhalgat et al. 2020, arXiv:2004.09576.

    Example:
        >>> x, config = jnp.array([0.2, -1.4, 7.0]), jq.ArrayConfig(format=jq.INT4)
        >>> jq.training.fake_quantize(x, config).tolist()
        [0.0, -1.0, 7.0]
        >>> jax.grad(lambda x: jq.training.fake_quantize(x, config).sum())(x).tolist()
        [1.0, 1.0, 1.0]
    """
    check_axis(axis)
    return _fake_quantize(x, config, axis, learned, key)


@partial(jax.jit, static_argnames="axis")
def _fake_quantize(x, config, axis, learned, key):
    return quantize_for_training(x, config, axis, learned, key).decode()


def quantize_for_training(
    x: jax.Array,
    config: ArrayConfig,
    axis: Axes = 0,
    learned: LearnedStep | LearnedRange | None = None,
    key: jax.Array | None = None,
) -> QTensor:
    """Returns x as a QTensor whose `values` are `fake_quantize(x, config, axis, learned, key)`."""
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


def scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    """Returns x; its gradient is multiplied by `factor`."""
    return _scale_gradient(x, factor)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _scale_gradient(x, factor):
    return x


@_scale_gradient.defjvp
def _(factor, primals, tangents):
    return primals[0], tangents[0] * factor


def gradient_factor(count: float, config: ArrayConfig) -> float:
    """Returns the factor for the gradient of a step that `count` elements share.

    With it, steps and weights change at the same rate relative to their size (LSQ, section 2.2).
    """
    qmin, qmax = config.bounds
    return 1 / math.sqrt(max(count, 1) * (qmax if config.symmetric else qmax - qmin))
