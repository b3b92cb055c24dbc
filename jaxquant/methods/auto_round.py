"""AutoRound: rounding offsets and ranges trained by signs of gradients."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..core import ArrayConfig, Axes, QTensor
from .adjustable import AdjustableRounding, Adjustments
from .method import Notes, Statistics, check_count, is_method, with_notes
from .nearest import Nearest
from .output_error import weighted
from .statistics import CrossMoment, SecondMoment, Statistic


@dataclasses.dataclass(frozen=True)
class AutoRound:
    """Trains by how much each weight is moved before it is rounded, and the range of each group.

        q = round(W / scale + zero_point + v)        v in [-1/2, 1/2] for each weight
        range = [low * b, high * a]                  a, b in [0, 2] for each group, 1 to start with
        minimizes E|W x - Q x|^2 = trace((W - Q) S (W - Q)^T), S = E[x x^T]

    Signed gradient descent, with straight-through gradients and a rate that falls linearly from 1 /
    iterations to 0. Each row of W is the best of all its iterations, because rows do not depend on
    each other unless they share scales. One matrix multiplication (N, K) x (K, K) per iteration.

    The paper minimizes the error of the outputs of a block of layers: see `tuning.sequential`.

    Attributes:
        iterations: number of steps.
        start: method whose scales and codes are the start: `Nearest()`, `Importance()`, or
            `GPTQ()`, from whose codes v moves away only where that helps.

    Raises:
        ValueError: iterations is not positive; or start is not a method, needs `CrossMoment`,
            or makes offsets, like HQQ.

    Guarantee: trace((W - Q) S (W - Q)^T) is not larger than that of the start.
    Source: Cheng et al. 2023, arXiv:2309.05516, section 3; factors up to 2: Cheng et al. 2025
        (SignRoundV2), arXiv:2512.04746.

    Example:
        >>> weight, config = jnp.array([[50.4, 127.0, 3.4, 0.4]]), jq.ArrayConfig()
        >>> alike = {jq.methods.SecondMoment: jnp.ones((4, 4))}  # All channels are equal.
        >>> q = jq.methods.AutoRound(iterations=20)(weight, alike, config, 1)
        >>> abs(float(jnp.sum(q.dequantize() - weight))) < 0.5
        True
    """

    iterations: int = 200
    start: Any = Nearest()  # noqa: RUF009 (frozen, so it can be shared)

    def __post_init__(self) -> None:
        check_count("iterations", self.iterations, 1)
        if not is_method(self.start):
            raise ValueError(
                f"start must be a method, such as Nearest() or GPTQ(); got {self.start!r}."
            )
        if CrossMoment in self.start.statistics:
            raise ValueError(
                "AutoRound minimizes the error with S alone; got a start that needs CrossMoment, "
                f"{self.start!r}. Use tuning.sequential, or a start without it."
            )

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """`SecondMoment`, and those of the start."""
        return tuple(dict.fromkeys((SecondMoment, *self.start.statistics)))

    def __call__(
        self, weight: jax.Array, means: Statistics, config: ArrayConfig, axis: Axes
    ) -> QTensor | tuple[QTensor, Notes]:
        """Quantizes a matrix.

        Args:
            weight: (N, K) floating-point.
            means: those of `statistics`, by class.
            config, axis: as for `quantize`.

        Returns:
            QTensor like that of the start, or (QTensor, notes) if the start has notes.
        """
        q, notes = with_notes(self.start(weight, means, config, axis))
        second, wide = means[SecondMoment], weight.astype(jnp.float32)
        rounding = AdjustableRounding.of(wide, q, config)
        shares = rounding.groups.blocks[0] > 1

        def losses(error, gradient):
            of_rows = jnp.sum(error * gradient, 1)
            return jnp.broadcast_to(jnp.sum(of_rows), of_rows.shape) if shares else of_rows

        def step(state, i):
            current, best, least = state
            values, to_gradients = jax.vjp(rounding.values, current)
            error = values - wide
            gradient = weighted(error, second)
            loss = losses(error, gradient)
            best = _better(loss < least, current, best)
            rate = (1 - i / self.iterations) / self.iterations
            following = current.stepped(*to_gradients(gradient), rate)
            return (following, best, jnp.minimum(loss, least)), None

        first = rounding.initial()
        state = first, first, jnp.full(len(wide), jnp.inf)
        (_, best, least), _ = jax.lax.scan(step, state, jnp.arange(self.iterations + 1.0))
        trained = rounding.quantized(best)
        error = q.astype(jnp.float32).dequantize() - wide
        kept = ~(least < losses(error, weighted(error, second)))
        q = _with_rows(kept[:, None], dataclasses.replace(trained, dtype=q.dtype), q)
        return (q, notes) if notes else q


def _better(is_better: jax.Array, new: Adjustments, old: Adjustments) -> Adjustments:
    """The adjustments of each row; all of them if rows share scales."""

    def choose(a, b):
        rows = is_better if a.shape[0] == len(is_better) else is_better[:1]
        return jnp.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)


def _with_rows(kept: jax.Array, new: QTensor, old: QTensor) -> QTensor:
    """The rows of `old` where they are kept, and those of `new` elsewhere."""

    def choose(a, b):
        # Outer scales of nested scales are equal.
        return jnp.where(kept if a.shape[0] == len(kept) else kept[:1], b, a)

    return jax.tree.map(choose, new, old)
