"""Hadamard matrices: entries of 1 and -1, orthogonal columns. Constructed in NumPy."""

import functools
import math

import numpy as np


@functools.cache
def hadamard(n: int) -> np.ndarray:
    """A Hadamard matrix H (n, n), with H H^T = n I, as a read-only int8 array.

        n = m 2^k:    H_n = H_m kron H_2 kron ... kron H_2

    H_m is 1 for powers of two, and otherwise one of the two constructions of Paley.

    Args:
        n: the order: a power of two; or m 2^k with m = q + 1 for a prime q = 3 mod 4, or
            m = 2 (q + 1) where q = 1 mod 4 is a prime or the square of one. m = 12, 20, 28, 36,
            44, 52, 60, 68, 76, 84 and 100 are of this form, but 92 is not.

    Raises:
        ValueError: n does not have that form; the text says which sizes near it do.

    Source: Paley 1933, On orthogonal matrices; Sylvester 1867.

    Example:
        >>> h = jq.methods.hadamard(12).astype(int)
        >>> bool((h @ h.T == 12 * jnp.eye(12)).all())
        True
    """
    factors = hadamard_factors(n)
    if factors is None:
        raise ValueError(
            "The order of a Hadamard matrix must be a power of two, or m * 2^k with m such as 12, "
            f"20, 28, 36, 44, 52 or 60; got {n!r}. Choose "
            f"{' or '.join(map(str, near_orders(n)))}."
        )
    m, power = factors
    matrix = _paley(m) if m > 1 else np.ones((1, 1), np.int8)
    pair = np.array([[1, 1], [1, -1]], np.int8)
    for _ in range(power):
        matrix = np.kron(matrix, pair)
    matrix.setflags(write=False)
    return matrix


def near_orders(n: int, count: int = 2) -> list[int]:
    """The orders nearest to n, at most `count` below it and as many above."""
    n = n if isinstance(n, int) else 1
    below = [m for m in range(n - 1, max(0, n - 200), -1) if hadamard_factors(m)][:count]
    above = [m for m in range(max(n, 0) + 1, max(n, 0) + 200) if hadamard_factors(m)][:count]
    return [*reversed(below), *above]


def hadamard_factors(n: int) -> tuple[int, int] | None:
    """(m, k) with n = m 2^k and the smallest m that has a construction; None if none has."""
    if not isinstance(n, int) or n < 1:
        return None
    power = (n & -n).bit_length() - 1
    odd = n >> power
    if odd == 1:
        return 1, power
    for k in range(power - 2, -1, -1):
        if _field(n >> k) is not None:
            return n >> k, k
    return None


def _field(m: int) -> tuple[int, int, bool] | None:
    """(p, d, whether m = p^d + 1 and not 2 p^d + 2) of the field that gives H_m, or None."""
    if _is_prime(m - 1) and (m - 1) % 4 == 3:
        return m - 1, 1, True
    q = m // 2 - 1
    if m % 2 == 0 and q % 4 == 1:
        root = math.isqrt(q)
        if _is_prime(q):
            return q, 1, False
        if root * root == q and _is_prime(root):
            return root, 2, False
    return None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _paley(m: int) -> np.ndarray:
    """H_m from the field of q = p^d elements, by Paley's construction I or II."""
    field = _field(m)
    assert field is not None, m
    p, degree, is_first = field
    jacobsthal = _jacobsthal(p, degree)
    q = len(jacobsthal)
    conference = np.zeros((q + 1, q + 1), np.int8)
    conference[0, 1:], conference[1:, 0] = 1, -1 if is_first else 1
    conference[1:, 1:] = jacobsthal
    unit = np.eye(q + 1, dtype=np.int8)
    if is_first:
        return conference + unit
    blocks = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(conference, blocks[0]) + np.kron(unit, blocks[1])


def _jacobsthal(p: int, degree: int) -> np.ndarray:
    """chi(a - b) for all elements a, b of a field: 1 for squares, -1 for others, 0 for 0.

    The field of p^2 elements is a + b sqrt(n), n no square mod p. An element of it is a square if
    its norm a^2 - n b^2 is one mod p.
    """
    squares = np.full(p, -1, np.int8)
    squares[np.arange(p) ** 2 % p] = 1
    squares[0] = 0
    numbers = np.arange(p)
    difference = (numbers[:, None] - numbers) % p
    if degree == 1:
        return squares[difference]
    n = int(np.argmin(squares))
    a, b = (x.ravel() for x in np.meshgrid(numbers, numbers, indexing="ij"))
    norm = (a[:, None] - a) ** 2 - n * (b[:, None] - b) ** 2
    return squares[norm % p]
