"""Straight-through gradients: from a quantized array to the array, scale and zero point."""

from functools import partial

import jax
import jax.numpy as jnp

from . import affine
from .blocks import blocks_between, split, to_blocks
from .config import ArrayConfig
from .qtensor import QTensor, scale_values


def straight_through(
    x: jax.Array,
    q: QTensor,
    config: ArrayConfig,
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
    *,
    margin: bool = True,
) -> jax.Array:
    """The dequantized q, with straight-through derivatives for x, scale and zero point.

    Let v = x / scale + zero_point, and [a, b] the range of codes. The code q is round(v) inside
    the range (a <= v <= b), and the nearer end outside of it:

        d value / d x          = 1                            inside, 0 elsewhere
        d value / d scale      = (q - zero_point) - x/scale   inside, q - zero_point elsewhere
        d value / d zero_point = 0                            inside, -scale elsewhere

    Args:
        x: the array that was quantized.
        q: QTensor of x quantized with `config`, stored in the axis order of x.
        config: only its format and value range are used.
        scale, zero_point: float arrays in the shape of q's scale, or scalars, that get gradients;
            None for no gradient. Their values are not used, because q has its own.
        margin: whether elements outside the range by less than half of the outermost step count
            as inside. Pass True if the range was computed from x, so that rounding errors do not
            remove the gradient of its extreme elements.

    Returns:
        q.dequantize(), bit for bit.

    Source: straight-through estimator: Bengio et al. 2013, arXiv:1308.3432; step: Esser et al.
        2020 (LSQ), arXiv:1902.08153, eq. 3; zero point: Bhalgat et al. 2020 (LSQ+),
        arXiv:2004.09576, eq. 5.
    """
    # Floating-point codes would otherwise get a zero gradient, in a dtype without gradients.
    fixed = jax.tree.map(jax.lax.stop_gradient, q)
    return _values((x, scale, zero_point), fixed, config, margin)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _values(sources, q, config, margin):
    return q.dequantize().astype(sources[0].dtype)


@partial(_values.defjvp, symbolic_zeros=True)
def _(config, margin, primals, tangents):
    (x, *_), q = primals
    out = _values(*primals, config, margin)
    of_x, *of_parameters = (None if _is_zero(t) else t for t in tangents[0])
    compute = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    blocks = blocks_between(q.codes.shape, q.scale.shape)

    def per_element(values):
        return split(values.astype(compute), blocks)[0]

    def per_block(values):
        return to_blocks(jnp.broadcast_to(values, q.scale.shape).astype(compute), blocks)

    step = per_block(scale_values(q.scale))
    # Decoded in `compute`, because bfloat16 rounds values by up to half a step of int8 codes.
    coded = per_element(q.astype(compute).decode()) / step
    scaled = per_element(x) / step
    zero = 0 if q.zero_point is None else per_block(q.zero_point)
    first, last = affine.clip_edges(config) if margin else config.bounds
    is_inside = (scaled + zero >= first) & (scaled + zero <= last)
    slopes = coded - jnp.where(is_inside, scaled, 0), jnp.where(is_inside, 0, -step)
    total = jnp.zeros_like(coded)
    if of_x is not None:
        total += jnp.where(is_inside, per_element(of_x), 0)
    for tangent, slope in zip(of_parameters, slopes, strict=True):
        if tangent is not None:
            total += per_block(tangent) * slope
    return out, total.reshape(x.shape).astype(out.dtype)


def _is_zero(tangent):
    return tangent is None or isinstance(tangent, jax.custom_derivatives.SymbolicZero)
