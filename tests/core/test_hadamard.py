"""Hadamard matrices and rotations of blocks of channels, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import BlockRotation
from jaxquant.core import check_block, hadamard

# Powers of two, both constructions of Paley, squares of primes (20 from 9 is found from 19), and
# the widths of MiniLM and SmolLM2.
ORDERS = (1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 48, 52, 60, 68, 76, 84, 100, 108, 384, 576, 1536)


@pytest.mark.parametrize("n", ORDERS)
def test_columns_are_orthogonal_and_have_entries_of_one(n):
    matrix = hadamard(n)
    assert matrix.dtype == np.int8
    assert set(np.unique(matrix)) <= {1, -1}
    wide = matrix.astype(np.float64)
    np.testing.assert_array_equal(wide @ wide.T, n * np.eye(n))


@pytest.mark.parametrize(
    ("n", "near"), [(92, "84 or 88 or 96 or 100"), (0, "1 or 2"), (3, "1 or 2 or 4 or 8")]
)
def test_orders_that_cannot_be_constructed_are_errors(n, near):
    with pytest.raises(ValueError, match=rf"m such as 12, .*; got {n}\. Choose {near}\."):
        hadamard(n)
    with pytest.raises(ValueError, match=r"got 4\.0\. Choose"):
        hadamard(4.0)  # pyright: ignore[reportArgumentType]


def rotation(shape, block, seed=0):
    signs = np.random.default_rng(seed).choice([-1, 1], shape).astype(np.int8)
    return BlockRotation(jnp.asarray(signs), block)


def by_definition(x, signs, block):
    """Each run of channels on its own, in float64."""
    x, signs = np.asarray(x, np.float64), np.asarray(signs, np.float64).ravel()
    matrix = hadamard(block).astype(np.float64) / np.sqrt(block)
    out = np.empty_like(x)
    for start in range(0, x.shape[-1], block):
        run = slice(start, start + block)
        out[..., run] = (x[..., run] * signs[run]) @ matrix
    return out


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    ("channels", "block", "dtype"),
    [
        (24, 12, jnp.float64),
        (40, 20, jnp.float64),
        (64, 8, jnp.bfloat16),
        (64, 8, jnp.float32),
        (384, 384, jnp.bfloat16),
        (576, 576, jnp.float32),
        (1536, 1536, jnp.float32),
    ],
    ids=str,
)
def test_rotations_match_the_definition(channels, block, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.asarray(np.random.default_rng(1).normal(size=(3, channels)), dtype)
        r = rotation((channels,), block)
        want = by_definition(x, r.signs, block)
        found = jax.jit(lambda r, x: r.apply(x, (1,)))(r, x)
        assert found.dtype == dtype
        tolerance = {2: 0.02, 4: 2e-6, 8: 1e-13}[dtype.dtype.itemsize]
        np.testing.assert_allclose(np.asarray(found, np.float64), want, 0, tolerance)
        np.testing.assert_allclose(
            np.asarray(r.undo(found, (1,)), np.float64), np.asarray(x, np.float64), 0, 2 * tolerance
        )
        if dtype == jnp.float64:
            np.testing.assert_allclose(np.asarray(x) @ r.matrix(), want, 0, 1e-13)
            np.testing.assert_allclose(r.matrix() @ r.matrix().T, np.eye(channels), 0, 1e-13)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("axes", [(1, 2), (2, 1), (0, 2), (2, 0)], ids=str)
def test_several_axes_are_flattened_in_their_order(axes):
    x = np.random.default_rng(2).normal(size=(4, 6, 10)).astype(np.float32)
    lengths = tuple(x.shape[a] for a in axes)
    r = rotation(lengths, 4 if np.prod(lengths) % 8 else 2)
    (rest,) = {0, 1, 2} - set(axes)
    rows = x.transpose(rest, *axes).reshape(x.shape[rest], -1)
    want = by_definition(rows, r.signs, r.block).reshape(x.shape[rest], *lengths)
    found = np.asarray(r.apply(jnp.asarray(x), axes)).transpose(rest, *axes)
    np.testing.assert_allclose(found, want, 0, 2e-6)
    back = r.undo(r.apply(jnp.asarray(x), axes), axes)
    np.testing.assert_allclose(back, x, 0, 2e-6)


def test_rotations_of_other_channels_are_errors():
    with pytest.raises(ValueError, match=r"contracted axes, \(6,\); got \(8,\) for axes \(1,\)"):
        rotation((8,), 4).apply(jnp.ones((2, 6)), (1,))
    with pytest.raises(ValueError, match=r"channels, 24; got 5\. Choose one of 1, 2, 4, 8, 12, 24"):
        rotation((24,), 5).apply(jnp.ones((2, 24)), (1,))
    with pytest.raises(ValueError, match=r"must be a power of two, .*; got 6"):
        check_block(6, 24)
