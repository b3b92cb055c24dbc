"""Products with one matrix per group of rows for training, quantized forward and in gradients."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import ops
from ..jaxprs import vary_alike
from .delayed import DelayedScaling
from .product import AxesOfBoth, check_product, run_product, transpose_product
from .product_config import ProductConfig


@dataclasses.dataclass(frozen=True)
class _Spec:
    """Static arguments of `ragged_dot`, hashable: those of `lax.ragged_dot`."""

    precision: lax.PrecisionLike
    dtype: jax.typing.DTypeLike | None

    @property
    def contract(self) -> AxesOfBoth:
        """The axis k of both operands."""
        return (1,), (1,)

    @property
    def rotates(self) -> bool:
        """A rotation would mix rows of several groups."""
        return False

    def contract_in_gradient(self, side: int) -> AxesOfBoth:
        """The columns of out; for rhs, the rows."""
        return ((0,), (0,)) if side else ((1,), (2,))

    def along(self, contract: AxesOfBoth, shape: tuple[int, ...], size: int) -> tuple[int, int]:
        """The only axis that is contracted."""
        return contract[0][0], contract[1][0]

    def blocks(self, side: int, shape: tuple[int, ...], sizes: tuple[int, ...]) -> dict[int, int]:
        """2-D blocks, by axis: of k, and of rows or columns."""
        return {1: sizes[0], 2 if side else 0: sizes[1]}

    def run(self, lhs: Any, rhs: Any, arrays: jax.Array) -> jax.Array:
        """The product itself."""
        return ops.ragged_dot(lhs, rhs, arrays, self.precision, self.dtype)

    def run_gradient(self, side: int, gradient: Any, other: Any, like: Any, arrays: Any) -> Any:
        """The gradient of a side."""

        def product(lhs, rhs):
            return lax.ragged_dot(lhs, rhs, arrays, self.precision)

        return transpose_product(product, side, gradient, other, like)


def ragged_dot(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array | np.ndarray,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    *,
    config: ProductConfig,
    key: jax.Array | None = None,
    scaling: DelayedScaling | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot` of float arrays, quantized forward and in both gradients.

        out[i, n]          = sum over k of Q(lhs)[i, k] Q(rhs)[group of row i, k, n]
        lhs gradient[i, k] = sum over n of Q(gradient)[i, n] Q(rhs)[group of row i, k, n]
        rhs gradient[g, k, n] = sum over rows i of group g of Q(lhs)[i, k] Q(gradient)[i, n]

    Q(x) is `jaxquant.quantize(x, ...)`, with scales shared along the axis that is summed over: in
    the gradient of rhs along the rows of all groups. Groups of elements run along the same axis.
    The first two multiply codes, the last one dequantizes them.

    Args:
        lhs: floating-point array (M, K).
        rhs: floating-point array (G, K, N), one matrix per group.
        group_sizes: integers (G,), rows of lhs in each group, in order. Rows beyond their sum give
            zeros.
        precision: as for `jax.lax.ragged_dot`.
        preferred_element_type, config, key, scaling: as for `dot_general`;
            `config.rhs_gradient_rotation` is not used.

    Returns:
        Array (M, N).

    Raises:
        ValueError: the shapes do not match, or as for `dot_general`.

    Gradients and error: as for `dot_general`.
    Source: Wortsman et al. 2023 (SwitchBack), arXiv:2304.13013, with one matrix per group.

    Example:
        >>> experts, config = jnp.ones((2, 8, 4)), jq.training.SWITCHBACK
        >>> x, sizes = jnp.ones((5, 8)), jnp.array([2, 3])
        >>> jq.training.ragged_dot(x, experts, sizes, config=config).shape
        (5, 4)
    """
    check_product(lhs, rhs, config, key, scaling)
    group_sizes = jnp.asarray(group_sizes)
    is_matched = (lhs.ndim, rhs.ndim) == (2, 3) and lhs.shape[1] == rhs.shape[1]
    if not is_matched or group_sizes.shape != rhs.shape[:1]:
        raise ValueError(
            "ragged_dot expects (M, K) by (G, K, N) and group_sizes (G,); got "
            f"{lhs.shape} by {rhs.shape} and {group_sizes.shape}."
        )
    lhs, rhs = vary_alike([lhs, rhs])
    spec = _Spec(precision, preferred_element_type)
    return run_product(spec, config, lhs, rhs, key, scaling, group_sizes)
