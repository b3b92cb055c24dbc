"""Matrix multiplications for training, quantized forward and in both gradients."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from .. import ops
from ..jaxprs import vary_alike
from .delayed import DelayedScaling
from .product import AxesOfBoth, check_product, run_product
from .product_config import ProductConfig


@dataclasses.dataclass(frozen=True)
class _Spec:
    """Static arguments of `dot_general`, hashable.

    Attributes:
        contract, batch: (axes of lhs, axes of rhs), from 0 up.
        ndims: ranks of lhs and rhs.
        precision, dtype, out_sharding: as for `lax.dot_general`; dtype is preferred_element_type.
        shardings: explicit shardings of lhs and rhs, for their gradients; None without.
    """

    contract: AxesOfBoth
    batch: AxesOfBoth
    ndims: tuple[int, int]
    precision: lax.PrecisionLike
    dtype: jax.typing.DTypeLike | None
    out_sharding: jax.sharding.NamedSharding | jax.P | None
    shardings: tuple[jax.sharding.NamedSharding | None, jax.sharding.NamedSharding | None]

    def free(self, side: int) -> tuple[int, ...]:
        """Axes of an operand (side 0: lhs, 1: rhs) that are neither contracted nor batch axes."""
        taken = self.contract[side] + self.batch[side]
        return tuple(a for a in range(self.ndims[side]) if a not in taken)

    @property
    def rotates(self) -> bool:
        """Whether the gradient of rhs may rotate its operands."""
        return True

    def contract_in_gradient(self, side: int) -> AxesOfBoth:
        """Axes that the gradient of a side contracts: those of out, and the other side's."""
        free = self.free(1 - side)
        first = len(self.batch[0]) + (0 if side else len(self.free(0)))
        return tuple(range(first, first + len(free))), free

    def axes_of_gradient(self, side: int) -> list[int]:
        """The axes of an operand in the order in which its gradient is computed."""
        by_other = np.argsort(self.contract[1 - side]).tolist()
        contract = [self.contract[side][i] for i in by_other]
        return [*self.batch[side], *self.free(side), *contract]

    def along(self, contract: AxesOfBoth, shape: tuple[int, ...], size: int) -> tuple[int, int]:
        """The axes along which groups run in the two operands of a product."""
        if not contract[0]:
            return -1, -1
        chosen = _group_axis(contract[0], shape, size)
        return chosen, contract[1][contract[0].index(chosen)]

    def blocks(self, side: int, shape: tuple[int, ...], sizes: tuple[int, ...]) -> dict[int, int]:
        """2-D blocks, by axis: a contracted one, and a free one."""
        pairs = zip((self.contract[side], self.free(side)), sizes, strict=True)
        return {_group_axis(axes, shape, size): size for axes, size in pairs if axes}

    def run(self, lhs: Any, rhs: Any, arrays: None) -> jax.Array:
        """The product itself."""
        numbers = self.contract, self.batch
        sharding = self.out_sharding
        return ops.dot_general(lhs, rhs, numbers, self.precision, self.dtype, out_sharding=sharding)

    def run_gradient(self, side: int, gradient: Any, other: Any, like: Any, arrays: None) -> Any:
        """The gradient of a side."""
        order = self.axes_of_gradient(side)
        leading = tuple(range(len(self.batch[0])))
        out = ops.dot_general(
            gradient,
            other,
            (self.contract_in_gradient(side), (leading, self.batch[1 - side])),
            self.precision,
            self.dtype,
            out_sharding=_in_order(self.shardings[side], order),
        )
        return out.transpose(np.argsort(order))


def _group_axis(axes: Sequence[int], shape: tuple[int, ...], size: int) -> int:
    """The last of these axes that has room for a group, or else the longest."""
    fitting = [a for a in sorted(axes) if shape[a] >= size]
    return fitting[-1] if fitting else max(sorted(axes), key=lambda a: (shape[a], a))


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    *,
    out_sharding: jax.sharding.NamedSharding | jax.P | None = None,
    config: ProductConfig,
    key: jax.Array | None = None,
    scaling: DelayedScaling | None = None,
) -> jax.Array:
    """`jax.lax.dot_general` of float arrays, quantized forward and in both gradients.

        out          = Q(lhs) . Q(rhs)
        lhs gradient = Q(gradient) . Q(rhs)        for each Q scales along the axes
        rhs gradient = Q(gradient) . Q(lhs)        that this product contracts

    Q(x) is `jaxquant.quantize(x, ...)`. The products are computed by `jaxquant.dot_general`, which
    multiplies int8 codes as integers. Pass `functools.partial(dot_general, config=config)` to
    modules that accept a `dot_general`, such as those of Flax.

    Args:
        lhs, rhs: floating-point arrays.
        dimension_numbers, precision, out_sharding: as for `jax.lax.dot_general`.
        preferred_element_type: floating dtype of the result; None for the promoted dtype.
        config: which products and operands are quantized, and how.
        key: random key, required by `config.rounds_stochastically`. Pass a different one in each
            step, multiplication, example of vmap and device of shard_map. Both gradients use the
            same noise.
        scaling: histories for delayed scaling; None to compute the ranges from the operands. Its
            gradient slot returns the observed amax, see `DelayedScaling`: in shard_map with
            check_vma, the largest over all devices.

    Returns:
        Array of shape (batch, lhs free, rhs free).

    Raises:
        ValueError: an operand is not a floating-point array, the key is missing, or the config
            does not support `scaling`.
        TypeError: the shapes do not match; from `jax.lax.dot_general`.

    Gradients: rounding and clipping count as the identity, first-order derivatives only. lhs and
        rhs are saved for the backward pass as codes wherever codes are multiplied.
    Error: products whose operands have no config equal those of `jax.lax.dot_general` bit for bit.
        NaN or Inf in an operand makes every result that shares its scale NaN.
    Source: Wortsman et al. 2023 (SwitchBack), arXiv:2304.13013, with a config for each
        product; stochastic rounding: Gupta et al. 2015, arXiv:1502.02551, section 3.1; float8:
        Micikevicius et al. 2022, arXiv:2209.05433, section 3.

    Example:
        >>> x, w = jnp.ones((2, 3)), jnp.ones((3, 1))
        >>> numbers = ((1,), (0,)), ((), ())
        >>> config = jq.training.SWITCHBACK
        >>> jq.training.dot_general(x, w, numbers, config=config).tolist()
        [[3.0], [3.0]]
    """
    check_product(lhs, rhs, config, key, scaling)
    contract, batch = (
        (tuple(a % lhs.ndim for a in pair[0]), tuple(a % rhs.ndim for a in pair[1]))
        for pair in dimension_numbers
    )
    spec = _Spec(
        contract,
        batch,
        (lhs.ndim, rhs.ndim),
        precision,
        preferred_element_type,
        out_sharding,
        (_explicit_sharding(lhs), _explicit_sharding(rhs)),
    )
    # Outside the custom gradient, so that JAX sums the gradient of a shared operand over devices.
    lhs, rhs = vary_alike([lhs, rhs])
    return run_product(spec, config, lhs, rhs, key, scaling)


def matmul(
    a: jax.Array,
    b: jax.Array,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    config: ProductConfig,
    key: jax.Array | None = None,
    scaling: DelayedScaling | None = None,
) -> jax.Array:
    """`jax.numpy.matmul` of float arrays, quantized forward and in both gradients.

    Args:
        a: floating-point array (..., M, K).
        b: floating-point array (K, N), or (..., K, N) with the leading axes of a.
        precision, preferred_element_type, config, key, scaling: as for `dot_general`.

    Returns:
        Array of shape (..., M, N).

    Raises:
        ValueError: the shapes do not match, or as for `dot_general`.

    Example:
        >>> def loss(w):
        ...     options = {"config": jq.training.INT8_TRAINING, "key": jax.random.key(0)}
        ...     return jq.training.matmul(jnp.ones((2, 3)), w, **options).sum()
        >>> jax.grad(loss)(jnp.ones((3, 1))).tolist()
        [[2.0], [2.0], [2.0]]
    """
    check_product(a, b, config, key, scaling)
    is_stack = b.ndim > 2
    if a.ndim < 2 or b.ndim < 2 or (is_stack and a.shape[:-2] != b.shape[:-2]):
        raise ValueError(
            "matmul expects (..., M, K) by (K, N), or by (..., K, N) with the same leading axes; "
            f"got {a.shape} by {b.shape}. Broadcast or reshape them, or use dot_general."
        )
    leading = tuple(range(b.ndim - 2))
    dimension_numbers = ((a.ndim - 1,), (b.ndim - 2,)), (leading, leading)
    return dot_general(
        a,
        b,
        dimension_numbers,
        precision,
        preferred_element_type,
        config=config,
        key=key,
        scaling=scaling,
    )


def _explicit_sharding(x):
    """The sharding of an array if it is part of its type, else None."""
    sharding = jax.typeof(x).sharding
    return sharding if sharding.mesh.explicit_axes else None


def _in_order(sharding, order):
    """The sharding of an array after its axes are put into this order."""
    if sharding is None:
        return None
    named = dict(enumerate(sharding.spec))
    return sharding.update(spec=jax.P(*(named.get(a) for a in order)))
