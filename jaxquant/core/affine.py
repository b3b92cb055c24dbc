"""The arithmetic of quantization: from ranges to scales, and between values and codes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from .config import ArrayConfig
from .formats import Format
from .noise import Seed, uniform_noise


def fit_scale(
    low: jax.Array, high: jax.Array, config: ArrayConfig, *, covers: bool = False
) -> jax.Array:
    """The scale at which the codes span [low, high], before it is rounded to its dtype.

    Symmetric: high / config.symmetric_qmax. Asymmetric: (high - low) / (qmax - qmin). An empty
    range has scale 0. A power-of-two scale (e8m0) is that scale rounded up to a power of two. With
    floating-point codes it is 2^(floor(log2(high)) - floor(log2(qmax))) instead, the rule of
    OCP MX v1.0, section 6.3, which may clip the largest values, unless `covers`.
    """
    qmin, qmax = config.bounds
    span, code_span = high, config.symmetric_qmax
    if not config.symmetric:
        # Halved, so that a range wider than the largest finite float does not overflow.
        span, code_span = high / 2 - low / 2, (qmax - qmin) / 2
    if has_exponent_only(config.stored_scale_dtype):
        mantissa, exponent = jnp.frexp(span / code_span)
        exponent = jnp.where(mantissa == 0.5, exponent - 1, exponent)
        if not (covers or config.format.rounds or config.format.codebook):
            exponent = jnp.frexp(span)[1] - int(np.frexp(code_span)[1])
        scale = jnp.ldexp(jnp.ones_like(span), jnp.clip(exponent, -126, 126))
        return jnp.where(span == 0, 0, scale)
    # XLA divides by multiplying with the reciprocal, which must not be subnormal: subnormals are
    # flushed to zero.
    return jnp.minimum(span / code_span, 1 / float(jnp.finfo(span.dtype).tiny))


def has_exponent_only(dtype: str) -> bool:
    """Whether a floating-point dtype represents only powers of two."""
    return jnp.finfo(dtype).nmant == 0


def round_up(values: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The nearest numbers of a floating-point dtype that are not smaller in magnitude.

    In bfloat16, numbers below 1.5e-36 are rounded up to multiples of 1.2e-38.
    """
    step = _float_step(values, dtype)
    return jnp.copysign(jnp.ceil(jnp.abs(values) / step) * step, values)


def fit_zero_point(low: jax.Array, scale: jax.Array, config: ArrayConfig) -> jax.Array:
    """round(qmin - low / scale) in the dtype of the codes; 0 where the scale is NaN."""
    qmin, qmax = config.bounds
    zero_point = jnp.where(jnp.isnan(scale), 0, jnp.round(qmin - low / scale))
    return jnp.clip(zero_point, qmin, qmax).astype(config.format.dtype)


def encode(
    x: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    config: ArrayConfig,
    key: jax.Array | Seed | None = None,
) -> jax.Array:
    """The nearest code to x/scale + zero_point, clipped. Arrays broadcast.

    With a key, rounds stochastically to one of the two neighbouring codes, so that the
    expectation equals the value. A value that is exactly a code is not changed.
    """
    format, values = config.format, x / scale
    # Codes under a NaN scale are never used, but must be defined. Integer codes always are, and
    # testing for NaN would take a TPU 1.2 microseconds by its compiler's estimate.
    values = values if format.rounds else jnp.where(jnp.isnan(scale), 0, values)
    noise = None if key is None else uniform_noise(key, values.shape, values.dtype)
    if format.codebook is not None:
        find = _nearest if format.power is None else _nearest_power
        codes = find(values, format, noise)
        if not format.has_negative:
            codes = jnp.maximum(codes, (values > 0).astype(codes.dtype))
        return _code_of(codes, format)
    if format.rounds:
        values = jnp.round(values) if noise is None else _round_by(noise, values)
    elif noise is not None:
        step = _float_step(values, format.dtype)
        values = _round_by(noise, values / step) * step
    if zero_point is not None:
        values = values + zero_point.astype(values.dtype)
    return jnp.clip(values, *config.bounds).astype(format.dtype)


def cast_stochastically(
    x: jax.Array, dtype: jax.typing.DTypeLike, key: jax.Array | Seed
) -> jax.Array:
    """Casts float32 to a narrower floating dtype, to one of the two neighbours at random.

    The expectation is the value. Numbers of the dtype, NaN and Inf are not changed; below 1.5e-36,
    bfloat16 is rounded to multiples of 1.2e-38, the smallest normal number.
    """
    noise, step = uniform_noise(key, x.shape, x.dtype), _float_step(x, dtype)
    return (_round_by(noise, x / step) * step).astype(dtype)


def _round_by(noise, values):
    """Rounds up where the fractional part exceeds the noise, and down elsewhere.

    floor(values + noise) would be wrong, because the sum rounds: 127 + 0.9999999 is 128 in float32.
    """
    below = jnp.floor(values)
    return below + (noise < values - below).astype(values.dtype)


def clip_edges(config: ArrayConfig) -> tuple[float, float]:
    """The smallest and largest x/scale + zero_point within half a step of the outermost codes."""
    qmin, qmax = config.bounds
    format = config.format
    if format.rounds:
        return qmin - 0.5, qmax + 0.5
    if format.codebook is not None:
        book = format.codebook
        return qmin - (book[1] - book[0]) / 2, qmax + (book[-1] - book[-2]) / 2
    gaps = [2.0 ** (int(np.frexp(q)[1]) - 2 - jnp.finfo(format.dtype).nmant) for q in (qmin, qmax)]
    return qmin - gaps[0], qmax + gaps[1]


def decode(
    codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None, format: Format
) -> jax.Array:
    """Returns (codes - zero_point) * scale in the dtype of scale. Arrays broadcast."""
    if format.power is not None:
        return _power_value(codes, format, scale.dtype) * scale
    if format.codebook is not None:
        return _lookup(codes, format.codebook, scale.dtype) * scale
    values = codes.astype(scale.dtype)
    if zero_point is not None:
        values = values - zero_point.astype(scale.dtype)
    return values * scale


def _nearest(values, format, noise=None):
    """Index of the nearest codebook entry; the lower one in a tie.

    With uniform noise in [0, 1), rounds stochastically to the entry below or above the value.
    """
    codebook = format.codebook
    index = jnp.zeros(values.shape, jnp.int8 if len(codebook) <= 128 else jnp.int16)
    for below, above in itertools.pairwise(np.asarray(codebook).tolist()):
        if noise is None:
            is_above = values > (below + above) / 2
        else:
            is_above = (values - below) / (above - below) > noise
        index += is_above.astype(index.dtype)
    return index


def _nearest_power(values, format, noise=None):
    """`_nearest` for a power codebook, computed from the square root or fourth root."""
    count = len(format.codebook) // 2 if format.has_negative else len(format.codebook) - 1
    magnitude = jnp.minimum(jnp.abs(values), 1)
    root = jnp.sqrt(magnitude) if format.power == 2 else jnp.sqrt(jnp.sqrt(magnitude))
    index = jnp.minimum(jnp.floor(root * count), count - 1)
    below, above = (_raise(i / count, format.power) for i in (index, index + 1))
    # If rounding lifts the root to the next integer, `below` is above the value and is kept.
    part = 0.5 if noise is None else noise
    index += (magnitude - below > (above - below) * part).astype(index.dtype)
    if not format.has_negative:
        return jnp.where(values > 0, index, 0).astype(jnp.int16)
    return (jnp.where(values < 0, -index, index) + count).astype(jnp.int16)


def _power_value(codes, format, dtype):
    """Entries of a power codebook, computed from their codes."""
    book, index = format.codebook, _index_of(codes, format).astype(dtype)
    if not format.has_negative:
        return _raise(index / (len(book) - 1), format.power)
    value = (index - len(book) // 2) / (len(book) // 2)
    return jnp.sign(value) * _raise(value, format.power)


def _code_of(index, format):
    """The codes of codebook entries: the bits of their indices."""
    unsigned = index.astype(f"uint{format.bits}")
    return jax.lax.bitcast_convert_type(unsigned, jnp.dtype(format.dtype))


def _index_of(codes, format):
    """The indices of codebook entries, from their codes."""
    if jnp.issubdtype(codes.dtype, jnp.unsignedinteger):
        return codes
    return codes.astype(jnp.int16) & (2**format.bits - 1)


def _raise(x, power):
    square = x * x
    return square if power == 2 else square * square


def _float_step(values, dtype):
    """The spacing of the numbers of a floating-point dtype around each value.

    At least the smallest normal number of the values' dtype: subnormals are flushed to zero.
    """
    info = jnp.finfo(dtype)
    exponent = jnp.maximum(jnp.frexp(values)[1] - 1, int(info.minexp)) - int(info.nmant)
    step = jnp.ldexp(jnp.ones_like(values), exponent)
    return jnp.maximum(step, float(jnp.finfo(values.dtype).tiny))


def _lookup(codes, codebook, dtype):
    """codebook[codes] by selects over the bits of the codes, because gathers are slow on TPU."""
    index = codes.astype(jnp.int8)
    entries = [jnp.asarray(v, dtype) for v in codebook]
    bit = 0
    while len(entries) > 1:
        entries += entries[-1:] * (len(entries) % 2)
        # Bit 7 is the sign of an int8.
        is_set = (index & np.uint8(1 << bit).astype(np.int8)) != 0
        entries = [
            jnp.where(is_set, b, a) for a, b in zip(entries[::2], entries[1::2], strict=True)
        ]
        bit += 1
    return entries[0]
