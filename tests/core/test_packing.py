import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import pack_int2, pack_int4, unpack_int2, unpack_int4
from jaxquant.core import concatenate_codes

from .. import oracles

PAIRS = {
    "int4": (pack_int4, unpack_int4, lambda c, axis: oracles.pack(c, axis, 4), 4),
    "int2": (pack_int2, unpack_int2, lambda c, axis: oracles.pack(c, axis, 2), 2),
}
each_pair = pytest.mark.parametrize("pack, unpack, oracle, bits", PAIRS.values(), ids=PAIRS)
# Lengths around whole bytes, in rank 1 to 3; few, because each compiles.
SHAPES = [(1,), (5,), (8,), (7, 2), (2, 6, 3)]


def codes_for(shape, bits, is_signed, seed=0):
    low = -(2 ** (bits - 1)) if is_signed else 0
    random = np.random.default_rng(seed)
    return random.integers(low, low + 2**bits, shape, np.int8 if is_signed else np.uint8)


@pytest.mark.some_rows(1)
@each_pair
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_packing_is_bit_exact_for_every_length_and_axis(pack, unpack, oracle, bits, data):
    shape = data.draw(st.sampled_from(SHAPES))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    is_signed, seed = data.draw(st.booleans()), data.draw(st.integers(0, 10**6))
    codes = codes_for(shape, bits, is_signed, seed)

    packed = pack(codes, axis=axis)

    assert packed.dtype == codes.dtype
    np.testing.assert_array_equal(np.asarray(packed).view(np.uint8), oracle(codes, axis))
    unpacked = unpack(packed, shape[axis], axis=axis)
    assert unpacked.dtype == codes.dtype
    np.testing.assert_array_equal(unpacked, codes)


@each_pair
def test_every_pair_of_codes_survives(pack, unpack, oracle, bits):
    every = np.arange(256, dtype=np.uint8).view(np.int8)
    fields = unpack(every, 256 * 8 // bits)
    np.testing.assert_array_equal(pack(fields), every)
    assert (fields.min(), fields.max()) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@pytest.mark.some_rows(2)
@each_pair
@pytest.mark.parametrize("sign", ["", "u"])
def test_native_dtypes_pack_like_bytes(pack, unpack, oracle, bits, sign):
    codes = codes_for((5, 3), bits, not sign)
    native = jnp.asarray(codes).astype(f"{sign}int{bits}")
    np.testing.assert_array_equal(pack(native, axis=0), pack(codes, axis=0))
    assert pack(native, axis=0).dtype == codes.dtype


@each_pair
def test_arrays_without_elements_pack_to_none(pack, unpack, oracle, bits):
    codes = np.zeros((0, 3), np.int8)
    assert pack(codes, axis=0).shape == (0, 3)
    assert unpack(pack(codes, axis=0), 0, axis=0).shape == (0, 3)
    assert unpack(pack(codes, axis=1), 3, axis=1).shape == (0, 3)


@each_pair
def test_packing_runs_under_vmap_and_eval_shape(pack, unpack, oracle, bits):
    stack = codes_for((3, 5, 2), bits, is_signed=True)
    packed = jax.vmap(lambda c: pack(c, axis=0))(stack)
    np.testing.assert_array_equal(packed, pack(stack, axis=1))
    shape = jax.eval_shape(lambda c: pack(c, axis=1), stack)
    assert shape.shape == packed.shape


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    "shape, axis, dtype", [((5,), 0, "int8"), ((5, 3), -1, "uint8"), ((2, 3, 5), 1, "int8")]
)
def test_bytes_are_those_of_keras(shape, axis, dtype):
    codes = codes_for(shape, 4, dtype == "int8")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        packed, packed_shape, length = keras.quantizers.pack_int4(
            jnp.asarray(codes), axis=axis, dtype=dtype
        )
        ours = pack_int4(codes, axis=axis)
        assert ours.shape == tuple(packed_shape)
        np.testing.assert_array_equal(ours, packed)
        theirs = keras.quantizers.unpack_int4(ours, length, axis=axis, dtype=dtype)
    np.testing.assert_array_equal(theirs, codes)
    np.testing.assert_array_equal(unpack_int4(jnp.asarray(packed), length, axis=axis), codes)


@pytest.mark.parametrize("pack, bits", [(pack_int4, 4), (pack_int2, 2)])
def test_codes_must_be_integers_of_their_width(pack, bits):
    message = rf"codes must be of dtype int{bits}, int8, uint{bits}, uint8; got float32\. Cast"
    with pytest.raises(ValueError, match=message):
        pack(np.ones((4, 2), np.float32))
    with pytest.raises(ValueError, match="got int32"):
        pack(np.ones((4, 2), np.int32))
    with pytest.raises(ValueError, match=r"axis must be an axis of shape \(4, 2\); got 2\."):
        pack(np.ones((4, 2), np.int8), axis=2)
    with pytest.raises(ValueError, match=r"axis must be an axis of shape \(4, 2\); got -3\."):
        pack(np.ones((4, 2), np.int8), axis=-3)


@pytest.mark.parametrize("unpack, bits", [(unpack_int4, 4), (unpack_int2, 2)])
def test_packed_bytes_are_checked(unpack, bits):
    with pytest.raises(ValueError, match="packed must be bytes, int8 or uint8; got int32"):
        unpack(np.ones((4, 2), np.int32), 8)
    with pytest.raises(ValueError, match=r"axis must be an axis of shape \(4, 2\); got 2\."):
        unpack(np.ones((4, 2), np.int8), 8, axis=2)
    most = 4 * 8 // bits
    for length in (most + 1, most - 8 // bits, -1):
        message = rf"length must fit the 4 bytes along axis 0; got {length} codes of {bits} bits"
        with pytest.raises(ValueError, match=message):
            unpack(np.ones((4, 2), np.int8), length)


@pytest.mark.parametrize("dtype", ["int2", "uint2", "int4", "int8"])
@pytest.mark.parametrize("axis", [0, 1])
def test_many_codes_are_concatenated_whatever_their_bits(dtype, axis):
    """XLA ends the process when it compiles this for arrays of 2 bits."""
    parts = np.random.default_rng(0).integers(0, 2, (9, 5, 7)).astype(np.int8)
    run = jax.jit(lambda *arrays: concatenate_codes(arrays, axis))
    got = run(*(jnp.asarray(part).astype(dtype) for part in parts))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(jnp.int8), np.concatenate(parts, axis))
