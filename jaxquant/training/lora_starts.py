"""Where adapters start: from the principal part of a weight, or of its quantization error."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

# More columns than the rank, which make a randomized decomposition accurate.
_OVERSAMPLING = 10

Quantize = Callable[[jax.Array], tuple[Any, jax.Array]]
Adapted = tuple[Any, jax.Array, jax.Array]


class Start(Protocol):
    """Chooses the base of a weight and its adapters."""

    def __call__(self, weight: jax.Array, quantize: Quantize, rank: int, key: jax.Array) -> Adapted:
        """The base, and adapters a (..., K, rank) and b (..., rank, N) whose product is added.

        Args:
            weight: matrices (..., K, N).
            quantize: from matrices to a base, and the matrices that it dequantizes to.
            rank: of the adapters.
            key: random key.
        """
        ...


@dataclasses.dataclass(frozen=True)
class PiSSA:
    """Adapters start as the principal part of a weight, and the base is the rest, quantized.

        weight = U S V^T          a b = U[:, :r] S[:r] V[:, :r]^T          base = Q(weight - a b)

    with sqrt(S) in each of a and b. What training changes most are the largest singular values,
    and the rest has fewer outliers, so that it loses less when it is quantized.

    Attributes:
        iterations: power iterations of a randomized decomposition, 2 to 8, which is faster for
            large weights; None for an exact one.

    Raises:
        ValueError: iterations is negative.

    Source: Meng et al. 2024 (PiSSA), arXiv:2404.02948, section 3, and section 4 for quantized
        bases; randomized: Halko et al. 2011, arXiv:0909.4061, algorithm 4.4.

    Example:
        >>> rules, key = jq.Rule("w", jq.W8A16), jax.random.key(0)
        >>> w = jnp.outer(jnp.arange(1.0, 5), jnp.ones(3))
        >>> start = jq.training.PiSSA()
        >>> params = jq.training.lora_init({"w": w}, rules, rank=1, key=key, start=start)
        >>> bool(jnp.abs(params["w"].base.dequantize()).max() < 1e-5)
        True
    """

    iterations: int | None = None

    def __post_init__(self) -> None:
        _check_iterations(self.iterations)

    def __call__(self, weight: jax.Array, quantize: Quantize, rank: int, key: jax.Array) -> Adapted:
        """As for `Start`."""
        a, b = principal_part(weight, rank, key, self.iterations)
        base, _ = quantize(weight - _product(a, b))
        return base, a, b


@dataclasses.dataclass(frozen=True)
class LoftQ:
    """Base and adapters together approximate the weight, by alternating between both.

        base_t = Q(weight - a_(t-1) b_(t-1))        a_t b_t = principal part of weight - base_t

    starting at a_0 b_0 = 0. So the first outputs are closer to those of the float model, above all
    in 2 and 3 bits. The step with the least error is kept, because later ones may be worse: with
    INT2 and `AbsMax()`, the error of five steps is a tenth larger than that of one.

    Attributes:
        steps: how often; 1 quantizes the weight once, and fits the adapters to the error.
        iterations: as for `PiSSA`.

    Raises:
        ValueError: steps is not positive, or iterations is negative.

    Source: Li et al. 2023 (LoftQ), arXiv:2310.08659, algorithm 1, which keeps the last step.

    Example:
        >>> config, key = jq.ArrayConfig(format=jq.INT2), jax.random.key(0)
        >>> w = jax.random.normal(key, (32, 8))
        >>> def error(**options):
        ...     x = jq.training.lora_init(w, jq.Rule("*", config), 4, key, **options)
        ...     return float(jnp.linalg.norm(x.dequantize() - w))
        >>> error(start=jq.training.LoftQ()) < 0.7 * error()
        True
    """

    steps: int = 5
    iterations: int | None = None

    def __post_init__(self) -> None:
        _check_count("steps", self.steps, 1)
        _check_iterations(self.iterations)

    def __call__(self, weight: jax.Array, quantize: Quantize, rank: int, key: jax.Array) -> Adapted:
        """As for `Start`."""
        low_rank, best = jnp.zeros_like(weight), None
        for _ in range(self.steps):
            base, values = quantize(weight - low_rank)
            a, b = principal_part(weight - values, rank, key, self.iterations)
            low_rank = _product(a, b)
            found = (base, a, b), jnp.linalg.norm(weight - values - low_rank)
            best = found if best is None else _nearer(found, best)
        assert best is not None
        return best[0]


def principal_part(
    x: jax.Array, rank: int, key: jax.Array, iterations: int | None
) -> tuple[jax.Array, jax.Array]:
    """Matrices a (..., K, rank) and b (..., rank, N) whose product is nearest to x (..., K, N).

    Args:
        x: the matrices.
        rank: at most K and N.
        key: random key, for a randomized decomposition.
        iterations: of it; None for an exact decomposition.
    """
    width = min(rank + _OVERSAMPLING, *x.shape[-2:])
    basis = None
    if iterations is not None:
        drawn = jax.random.normal(key, (*x.shape[:-2], x.shape[-1], width), x.dtype)
        basis, _ = jnp.linalg.qr(_product(x, drawn))
        for _ in range(iterations):
            other, _ = jnp.linalg.qr(_product(x.mT, basis))
            basis, _ = jnp.linalg.qr(_product(x, other))
    narrow = x if basis is None else _product(basis.mT, x)
    left, singular, right = jnp.linalg.svd(narrow, full_matrices=False)
    left = left if basis is None else _product(basis, left)
    root = jnp.sqrt(singular[..., :rank])
    return left[..., :rank] * root[..., None, :], root[..., None] * right[..., :rank, :]


def _product(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _nearer(found, best):
    """Of two pairs of arrays and an error the one with less, the second if they are equal."""
    return jax.tree.map(partial(jnp.where, found[1] < best[1]), found, best)


def _check_iterations(iterations):
    if iterations is not None:
        _check_count("iterations", iterations, 0)


def _check_count(name, value, least):
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not is_count:
        raise ValueError(f"{name} must be an int of at least {least}; got {value!r}.")
