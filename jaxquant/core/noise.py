"""Noise to round by, cheap enough to be drawn for each element of each product."""

import math

import jax
import jax.numpy as jnp

# The two steps of MurmurHash3's finalizer: (shift, factor).
_STEPS = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))


def uniform_noise(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Numbers in [0, 1), a hash of each element's place under two words of the key.

        noise = floor(mix(mix(place ^ word 0) + word 1) / 2^8) / 2^24

    `jax.random` would take most of the time of a quantization and keep what it draws in memory;
    this is fused with what is rounded by it. It is good enough to round by, and no more: nothing
    here withstands a search for patterns.

    Args:
        key: random key, of any implementation.
        shape: of the result. Places are counted row by row, modulo 2^32.
        dtype: floating, with at least the 24 bits of float32.

    Source: finalizer: Appleby 2011, MurmurHash3, `fmix32`.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    bits = _mix(_mix(place ^ first) + second)
    return (bits >> 8).astype(dtype) * jnp.asarray(2.0**-24, dtype)


def _mix(bits):
    for shift, factor in _STEPS:
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)
