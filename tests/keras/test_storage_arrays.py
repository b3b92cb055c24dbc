"""Arrays stored in dtypes that Keras variables and HDF5 files support."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from jaxquant.core import bits_of
from jaxquant.keras.files.storage_arrays import (
    _from_host,
    _on_host,
    from_storage_array,
    to_storage_array,
)

DTYPES = [
    "int8",
    "uint8",
    "int4",
    "uint4",
    "int2",
    "uint2",
    "float4_e2m1fn",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e8m0fnu",
    "bfloat16",
    "float16",
    "float32",
]
SHAPES = [(), (7,), (0, 5)]
# What Keras variables and HDF5 files hold on every backend.
HELD = {"int8", "uint8", "uint16", "float16", "float32"}


def bits_in(x):
    """The elements as integers, in NumPy: ml_dtypes stores one 4-bit element per byte."""
    x = np.asarray(x)
    if x.dtype.name in {"int4", "int2", "uint4", "uint2"}:
        return x.astype(np.int8)
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def with_every_bit(dtype, shape):
    """An array of random bits, including NaN and infinities."""
    rng = np.random.default_rng(0)
    if dtype in {"int4", "int2", "uint4", "uint2"}:
        info = jnp.iinfo(dtype)
        codes = rng.integers(int(info.min), int(info.max) + 1, shape)
        return jnp.asarray(codes.astype(np.int8).astype(jnp.dtype(dtype)))
    width = jnp.dtype(dtype).itemsize
    raw = rng.integers(0, 2 ** min(bits_of(dtype), 8), (*shape, width), dtype=np.uint8)
    return jnp.asarray(raw.view(jnp.dtype(dtype)).reshape(shape))


# Every dtype in one shape, and every shape in a dtype of 16, of 8 and of 4 bits.
OF_SHAPES = [(d, shape) for d in ("bfloat16", "float8_e4m3fn", "int4") for shape in SHAPES]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    ("dtype", "shape"), [*((d, (3, 2, 6)) for d in DTYPES), *OF_SHAPES], ids=str
)
def test_every_bit_round_trips(dtype, shape):
    if shape == () and bits_of(dtype) < 8:
        shape = (1, 1)  # Packed along the last axis, so one is needed.
    x = with_every_bit(dtype, shape)
    stored = to_storage_array(x)

    assert stored.dtype.name in HELD
    like = jax.eval_shape(to_storage_array, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert (stored.shape, stored.dtype) == (like.shape, like.dtype)
    on_host = _on_host(np.asarray(x))
    assert on_host.dtype == stored.dtype
    np.testing.assert_array_equal(on_host, stored)
    found = _from_host(on_host, x)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    np.testing.assert_array_equal(bits_in(found), bits_in(x))
    compiled = [jax.jit(from_storage_array, static_argnums=1)] if x.ndim == 3 else []
    for read in (from_storage_array, *compiled):
        found = read(stored, jax.ShapeDtypeStruct(x.shape, x.dtype))
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        np.testing.assert_array_equal(bits_in(found), bits_in(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bit_is_wasted(dtype):
    x = with_every_bit(dtype, (3, 16))
    stored = jax.eval_shape(to_storage_array, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert stored.size * stored.dtype.itemsize == 3 * 16 * bits_of(dtype) // 8


@pytest.mark.parametrize("shape", [(7,), (3, 2, 6)], ids=str)
def test_int4_is_packed_as_keras_packs_it(shape):
    codes = with_every_bit("int4", shape)
    packed, _, _ = keras.quantizers.pack_int4(np.asarray(codes).astype(np.int8), axis=-1)
    np.testing.assert_array_equal(to_storage_array(codes), packed)
