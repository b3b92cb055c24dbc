"""Error feedback: rounds the columns of a matrix in turn, and adds the errors to the next ones."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax.linalg import triangular_solve

_PRECISION = jax.lax.Precision.HIGHEST


class Factor(NamedTuple):
    """S + damping I = U diag(D) U^T with U unit upper triangular.

    Attributes:
        root: U sqrt(D), upper triangular (K, K).
        damping: what was added to the diagonal, in units of its mean.
    """

    root: jax.Array
    damping: jax.Array

    @property
    def unit(self) -> jax.Array:
        """U."""
        return self.root / jnp.diagonal(self.root)[None, :]

    @property
    def conditional(self) -> jax.Array:
        """D: the mean square of each channel that the later ones do not predict, (K,)."""
        return jnp.square(jnp.diagonal(self.root))

    def solve(self, b: jax.Array) -> jax.Array:
        """(S + damping I)^-1 b."""
        once = triangular_solve(self.root, b, left_side=True)
        return triangular_solve(self.root, once, left_side=True, transpose_a=True)


def factorize(second_moment: jax.Array, damping: float) -> Factor:
    """Factorizes S, with ten times the damping until that succeeds.

    Args:
        second_moment: S, (K, K) float32.
        damping: what is added to the diagonal first, in units of its mean.
    """
    mean = jnp.mean(jnp.diagonal(second_moment))
    # Nothing is known of channels that are all zero: each counts alike, and none predicts another.
    mean = jnp.where(mean > 0, mean, 1)
    identity = jnp.eye(second_moment.shape[0], dtype=second_moment.dtype)

    def attempt(damping):
        # Flipped, so that the errors of a column are predicted by those before it.
        s = second_moment / mean + damping * identity
        return jnp.flip(jnp.linalg.cholesky(jnp.flip(s)))

    def is_unfinished(state):
        damping, root = state
        return ~jnp.all(jnp.isfinite(root)) & (damping < 1e3)

    def step(state):
        damping = state[0] * 10
        return damping, attempt(damping)

    start = jnp.asarray(damping, second_moment.dtype)
    damping_used, root = jax.lax.while_loop(is_unfinished, step, (start, attempt(start)))
    return Factor(root * jnp.sqrt(mean), damping_used)


def predicted_gain(second_moment: jax.Array) -> jax.Array:
    """By how much error feedback lowers the output error of rounding to nearest, in dB.

        10 log10(tr(S) / tr(D)), S = U D U^T

    It holds for errors that are uniform and independent, as with many codes per group.

    Args:
        second_moment: S, (K, K), from `SecondMoment.finish`.

    Source: Chee et al. 2023 (QuIP), arXiv:2307.13304, section 3.2.

    Example:
        >>> s = 0.9 ** jnp.abs(jnp.arange(256)[:, None] - jnp.arange(256)[None, :])
        >>> round(float(jq.methods.predicted_gain(s)), 1)
        7.1
    """
    factor = factorize(second_moment, 1e-6)
    ratio = jnp.trace(second_moment) / jnp.sum(factor.conditional)
    return 10 * jnp.log10(ratio)


def feed_back(
    target: jax.Array,
    unit: jax.Array,
    block: int,
    fit: Callable[[jax.Array, jax.Array], Any],
    round_row: Callable[[Any, jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, Any]:
    """The values with (nearly) the least trace((W - Q) S (W - Q)^T), S = U D U^T.

        z_k = w_k + sum over j < k of (w_j - q_j) U_jk        q_k = round(z_k)

    Args:
        target: W^T, (K, N): one row per contracted channel.
        unit: U, (K, K), unit upper triangular. Its diagonal is taken for ones, not read.
        block: rows that `fit` sees at once; divides K.
        fit: (start of the block, best values (block, N)) -> pytree for `round_row`; the best values
            are those that would make up for all errors so far, if they were not rounded.
        round_row: (fitted, row within the block, z (N,)) -> the nearest values that have codes.

    Returns:
        Q^T, (K, N), up to rounding errors, and what `fit` returned, stacked over blocks.

    Source: Frantar et al. 2022 (GPTQ), arXiv:2210.17323, algorithm 1, in the form of Chee et al.
        2023 (QuIP), arXiv:2307.13304, section 3.
    """
    length, outputs = target.shape

    def of_block(errors, start):
        columns = jax.lax.dynamic_slice(unit, (0, start), (length, block))
        here = jax.lax.dynamic_slice(unit, (start, start), (block, block))
        w = jax.lax.dynamic_slice(target, (start, 0), (block, outputs))
        # Rows of `errors` from this block on are still zero.
        back = jnp.matmul(columns.T, errors, precision=_PRECISION)
        best = w + triangular_solve(
            here, back, left_side=True, transpose_a=True, unit_diagonal=True
        )
        fitted = fit(start, best)

        def of_row(j, state):
            z, errors = state
            value = round_row(fitted, j, z[j])
            error = w[j] - value
            later = jnp.where(jnp.arange(block) > j, here[j], 0)
            return z + later[:, None] * error[None, :], errors.at[j].set(error)

        _, new = jax.lax.fori_loop(0, block, of_row, (w + back, jnp.zeros_like(w)))
        return jax.lax.dynamic_update_slice(errors, new, (start, 0)), fitted

    starts = jnp.arange(0, length, block)
    errors, fitted = jax.lax.scan(of_block, jnp.zeros_like(target), starts)
    return target - errors, fitted
