"""Noise for stochastic rounding, cheap enough for every element of a matrix multiplication."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Seed:
    """What the noise of one array is computed from, in place of a random key. A pytree.

    Attributes:
        words: two words of 32 random bits.
    """

    words: jax.Array


def draw_seeds(key: jax.Array, count: int) -> list[Seed]:
    """Seeds for the noise of several arrays, drawn at once.

    XLA compiles each call of `jax.random` separately: 120 of them, for the states of 60 parameters,
    took 40 s.
    """
    return [Seed(words) for words in jax.random.bits(key, (count, 2), jnp.uint32)]


def uniform_noise(
    key: jax.Array | Seed, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Uniform noise in [0, 1): a hash of each element's position and two random words.

        a = (position ^ word 0) * 0xED5AD4BB
        b = (a ^ floor(a / 2^11)) * 0xAC4C1B51
        c = ((b ^ floor(b / 2^15)) + word 1) * 0x31848BAB
        noise = floor(c / 2^8) / 2^24

    modulo 2^32.

    Drawing with `jax.random` would take most of the time of a quantization and store the noise in
    memory. XLA fuses this hash with the rounding instead. Its quality suffices for stochastic
    rounding; do not use it where statistical independence matters.

    Args:
        key: random key of any implementation, or a `Seed`.
        shape: shape of the result. Positions are counted in row-major order, modulo 2^32.
        dtype: a floating-point dtype with at least the 24-bit mantissa of float32.

    Source: factors and shifts of `triple32` (Wellons 2018, "Prospecting for Hash Functions"), whose
    first and last shifts change little: positions differ in their low bits, noise in its high ones.
    """
    is_drawn = isinstance(key, Seed)
    first, second = key.words if is_drawn else jax.random.bits(key, (2,), jnp.uint32)
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    bits = (place ^ first) * jnp.uint32(0xED5AD4BB)
    bits = (bits ^ (bits >> 11)) * jnp.uint32(0xAC4C1B51)
    bits = ((bits ^ (bits >> 15)) + second) * jnp.uint32(0x31848BAB)
    return (bits >> 8).astype(dtype) * jnp.asarray(2.0**-24, dtype)
