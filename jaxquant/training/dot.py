"""Matrix multiplications for training, quantized forward and in both gradients."""

import dataclasses
from functools import partial

import jax
import numpy as np
from jax import lax

from .. import ops
from ..core import ArrayConfig, QTensor, quantize, quantize_with_range
from ..jaxprs import vary_alike, varying_axes
from .amax import amax_of
from .delayed import DelayedScaling
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

    contract: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    ndims: tuple[int, int]
    precision: lax.PrecisionLike
    dtype: jax.typing.DTypeLike | None
    out_sharding: jax.sharding.NamedSharding | jax.P | None
    shardings: tuple[jax.sharding.NamedSharding | None, jax.sharding.NamedSharding | None]

    def free(self, side: int) -> tuple[int, ...]:
        """Axes of an operand (side 0: lhs, 1: rhs) that are neither contracted nor batch axes."""
        taken = self.contract[side] + self.batch[side]
        return tuple(a for a in range(self.ndims[side]) if a not in taken)

    def contract_in_gradient(self, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Axes that the gradient of a side contracts: those of out, and the other side's."""
        free = self.free(1 - side)
        first = len(self.batch[0]) + (0 if side else len(self.free(0)))
        return tuple(range(first, first + len(free))), free

    def axes_of_gradient(self, side: int) -> list[int]:
        """The axes of an operand in the order in which its gradient is computed."""
        by_other = np.argsort(self.contract[1 - side]).tolist()
        contract = [self.contract[side][i] for i in by_other]
        return [*self.batch[side], *self.free(side), *contract]


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
        ValueError: an operand is not a floating-point array, the key is missing, the config does
            not support `scaling`, or a group size does not divide an axis.
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
    _check(lhs, rhs, config, key, scaling)
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
    return _dot_general(lhs, rhs, config, key, scaling, spec)


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


def _check(lhs, rhs, config, key, scaling):
    for name, x in (("lhs", lhs), ("rhs", rhs)):
        is_array = isinstance(x, jax.Array | np.ndarray)
        if not is_array or not jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
            got = f"{x.dtype} of shape {x.shape}" if is_array else type(x).__name__
            raise ValueError(
                f"{name} must be a floating-point array, not a quantized one; got {got}."
            )
    if not isinstance(config, ProductConfig):
        raise ValueError(
            f"config must be a ProductConfig such as training.INT8_TRAINING; got {config!r}."
        )
    if config.rounds_stochastically and key is None:
        raise ValueError(
            f"key must be a random key, because the config rounds stochastically; got {key}. Pass "
            "a different one in each step, or a config with rounds_stochastically=False."
        )
    if scaling is None:
        return
    config.check_delayed()
    if scaling.lhs.ndim != 1:
        raise ValueError(
            "scaling must be the state of one multiplication, with 1-D histories; got "
            f"{scaling.lhs.shape}. Scan or vmap over a stack of them."
        )


def _explicit_sharding(x):
    """The sharding of an array if it is part of its type, else None."""
    sharding = jax.typeof(x).sharding
    return sharding if sharding.mesh.explicit_axes else None


@partial(jax.jit, static_argnames="spec")
def _dot_general(lhs, rhs, config, key, scaling, spec):
    return _product(spec, config, lhs, rhs, key, scaling)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(spec: _Spec, config: ProductConfig, lhs, rhs, key, scaling):
    of_lhs, of_rhs = _ranges(scaling, lhs, rhs)
    return ops.dot_general(
        _operand(lhs, config.of_out[0], spec.contract[0], of_lhs),
        _operand(rhs, config.of_out[1], spec.contract[1], of_rhs),
        (spec.contract, spec.batch),
        spec.precision,
        spec.dtype,
        out_sharding=spec.out_sharding,
    )


def _forward(spec, config, lhs, rhs, key, scaling):
    out = _product(spec, config, lhs, rhs, key, scaling)
    of_lhs, of_rhs = _ranges(scaling, lhs, rhs)
    kept_lhs = _operand(lhs, config.of_rhs_gradient[1], spec.free(0), of_lhs)
    kept_rhs = _operand(rhs, config.of_lhs_gradient[1], spec.free(1), of_rhs)
    seen = None
    if scaling is not None:
        seen = _shared_amax(lhs, scaling.lhs), _shared_amax(rhs, scaling.rhs)
    return out, (kept_lhs, kept_rhs, seen, key, scaling)


def _backward(spec, config, kept, gradient):
    lhs, rhs, seen, key, scaling = kept
    key = key if config.rounds_stochastically else None
    limit = None if scaling is None else scaling.amax_limit(scaling.gradient, amax_of(gradient))

    def of_side(side, x, config, other):
        axes, _ = contract = spec.contract_in_gradient(side)
        order = spec.axes_of_gradient(side)
        leading = tuple(range(len(spec.batch[0])))
        out = ops.dot_general(
            _operand(gradient, config[0], axes, limit, key),
            other,
            (contract, (leading, spec.batch[1 - side])),
            spec.precision,
            spec.dtype,
            out_sharding=_in_order(spec.shardings[side], order),
        )
        return out.transpose(np.argsort(order)).astype(x.dtype)

    if scaling is not None:
        scaling = scaling.observed(*seen, _shared_amax(gradient, scaling.gradient))
    return (
        of_side(0, lhs, config.of_lhs_gradient, rhs),
        of_side(1, rhs, config.of_rhs_gradient, lhs),
        None,
        scaling,
    )


_product.defvjp(_forward, _backward)


def _ranges(scaling, lhs, rhs):
    """The ends of the ranges of lhs and rhs by delayed scaling; None without it."""
    if scaling is None:
        return None, None
    return scaling.amax_limit(scaling.lhs, amax_of(lhs)), scaling.amax_limit(
        scaling.rhs, amax_of(rhs)
    )


def _operand(x, config: ArrayConfig | None, contract, limit=None, key=None) -> jax.Array | QTensor:
    """x, quantized for a product that contracts these axes of it."""
    if config is None:
        return x
    if limit is not None:
        return quantize_with_range(x, -limit, limit, config, key=key)
    q = quantize(x, config, _shared_axes(config, contract), key)
    return q.reorder(ops.best_order(q, jax.default_backend()))


def _shared_axes(config, contract):
    """The axes along which scales are shared: those contracted, or the last of them in groups."""
    is_grouped = config.group_size is not None or config.format.group_size is not None
    axes = tuple(sorted(contract))
    return axes[-1] if is_grouped and axes else axes


def _shared_amax(x, history):
    """amax of x, over all devices of shard_map that share the history."""
    axes = varying_axes(x) - varying_axes(history)
    amax = amax_of(x)
    return lax.pmax(amax, tuple(sorted(axes))) if axes else amax


def _in_order(sharding, order):
    """The sharding of an array after its axes are put into this order."""
    if sharding is None:
        return None
    named = dict(enumerate(sharding.spec))
    return sharding.update(spec=jax.P(*(named.get(a) for a in order)))
