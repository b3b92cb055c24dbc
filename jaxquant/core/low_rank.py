"""A quantized array plus a trained low-rank product (LoRA)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .config import ArrayConfig
from .qtensor import ArrayLike, QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LowRank(ArrayLike):
    """A frozen quantized array plus a trained low-rank product (LoRA adapters). A pytree.

        x ~ base + (alpha / rank) * a @ b                      without `magnitude`
        x ~ magnitude * v / |v|    with v = base + (alpha / rank) * a @ b        (DoRA)

    The axes of the array are the stack axes, if any, then the axes of `a`, then those of `b`. A
    kernel (K, N) has a (K, rank) and b (rank, N). A stack of kernels has the same leading axis
    in base, a and b. A kernel (K, heads, size) may have a (K, rank) and b (rank, heads, size).
    The ranks of the three arrays determine which axis belongs to which, so slicing a stack with
    scan or vmap gives a valid LowRank.

    `base` gets no gradient. If `base` has `inputs`, activations are quantized for the product
    with `base` but not for the product with `a @ b`.

    Attributes:
        base: the quantized array; None in the trained part of a tree.
        a: float array (stack, first axes, rank).
        b: float array (stack, rank, last axes).
        magnitude: float array of the shape of the array, with length 1 along the axes that the norm
            |v| sums over: one trained norm per output. None without one. The norm counts as a
            constant in gradients. Operations dequantize arrays that have one.
        alpha: the low-rank product is weighted by alpha / rank, static.
        config: how `base` was quantized, and how it is quantized again when the adapters are
            merged into it, static.

    Source: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, eq. 5; Hu et al. 2021 (LoRA),
        arXiv:2106.09685, section 4.1; Liu et al. 2024 (DoRA), arXiv:2402.09353, eq. 5 and 11.

    Example:
        >>> config = jq.ArrayConfig(format=jq.INT8)
        >>> base = jq.quantize(jnp.zeros((4, 3)), config)
        >>> a, b = jnp.ones((4, 2)), jnp.ones((2, 3))
        >>> w = jq.training.LowRank(base, a, b, alpha=2, config=config)
        >>> w.rank, w.shape
        (2, (4, 3))
        >>> w.dequantize()[0].tolist()
        [2.0, 2.0, 2.0]
    """

    base: QTensor
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array | None = None
    alpha: float = dataclasses.field(kw_only=True, metadata={"static": True})
    config: ArrayConfig = dataclasses.field(kw_only=True, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the dequantized array."""
        return self.base.dtype

    @property
    def rank(self) -> int:
        """Length of the axis between `a` and `b`."""
        return self.a.shape[-1]

    @property
    def factor(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def axes(self) -> tuple[list[int], list[int]]:
        """The array axis of each axis of `a` and of `b`; `ndim` stands for the rank axis."""
        return _axes(self.a, self.b, self.ndim)

    def astype(self, dtype: jax.typing.DTypeLike) -> "LowRank":
        """Returns the same array with another dtype to dequantize to; `a` and `b` keep theirs."""
        return dataclasses.replace(self, base=self.base.astype(dtype))

    def dequantize(self) -> jax.Array:
        """Returns the array, computed in float32 (float64 if that is dtype)."""
        total = self._total()
        if self.magnitude is None:
            return total.astype(self.dtype)
        axes = [a for a, n in enumerate(self.magnitude.shape) if n == 1]
        norm = norms(jax.lax.stop_gradient(total), tuple(axes))
        return (self.magnitude.astype(total.dtype) * (total / norm)).astype(self.dtype)

    def with_magnitude(self, axes: tuple[int, ...]) -> "LowRank":
        """Returns the same array with a trained norm, summed over these axes."""
        norm = norms(self._total(), axes)
        return dataclasses.replace(self, magnitude=norm.astype(self.b.dtype))

    def _total(self):
        """base + (alpha / rank) * a @ b."""
        compute = jnp.float64 if self.dtype == jnp.float64 else jnp.float32
        base = jax.lax.stop_gradient(self.base).astype(compute).dequantize()
        return add_low_rank(base, self.a.astype(compute), self.b.astype(compute), self.alpha)

    def __repr__(self) -> str:
        a, b = (getattr(x, "shape", x) for x in (self.a, self.b))
        magnitude = "" if self.magnitude is None else ", magnitude"
        return f"LowRank({self.base!r}, a {a}, b {b}{magnitude}, alpha {self.alpha})"


def norms(values: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Norms over some axes, which keep length 1; 1 where all elements are zero."""
    norm = jnp.sqrt(jnp.sum(jnp.square(values), axes, keepdims=True))
    return jnp.where(norm == 0, 1, norm)


def low_rank_shapes(
    shape: tuple[int, ...], rank: int, stack: int = 0, split: int = -1
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `a` and `b` for an array with `stack` stack axes, where `b` starts at `split`."""
    return (*shape[:split], rank), (*shape[:stack], rank, *shape[split:])


def low_rank_product(a: jax.Array, b: jax.Array, alpha: float, stack: int = 0) -> jax.Array:
    """(alpha / rank) * a @ b, with `stack` stack axes, computed in the dtype of a and b."""
    ndim = a.ndim + b.ndim - 2 - stack
    a_axes, b_axes = _axes(a, b, ndim)
    out = list(range(ndim))
    product = jnp.einsum(a, a_axes, b, b_axes, out, precision=jax.lax.Precision.HIGHEST)
    return alpha / a.shape[-1] * product


def add_low_rank(values: jax.Array, a: jax.Array, b: jax.Array, alpha: float) -> jax.Array:
    """values + (alpha / rank) * a @ b, in the wider dtype of the two terms."""
    product = low_rank_product(a, b, alpha, a.ndim + b.ndim - 2 - values.ndim)
    dtype = jnp.promote_types(values.dtype, product.dtype)
    return values.astype(dtype) + product.astype(dtype)


def _axes(a: jax.Array, b: jax.Array, ndim: int) -> tuple[list[int], list[int]]:
    """The array axis of each axis of `a` and of `b`; `ndim` stands for the rank axis."""
    split = a.ndim - 1
    stack = split + b.ndim - 1 - ndim
    return [*range(split), ndim], [*range(stack), ndim, *range(split, ndim)]
