"""A product of two arrays with three quantized products: itself and both gradients."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import ArrayConfig, QTensor
from ..jaxprs import varying_axes
from ..lift import lift
from .amax import amax_of
from .delayed import DelayedScaling
from .operand import Plan, as_operand, name_codes, plan_operand
from .product_config import ProductConfig
from .residuals import Residual

AxesOfBoth = tuple[tuple[int, ...], tuple[int, ...]]


class Operation(Protocol):
    """A product: linear in lhs and in rhs. Hashable, a static argument.

    Sides are 0 for lhs and 1 for rhs.
    """

    @property
    def contract(self) -> AxesOfBoth:
        """The axes of lhs and rhs that it sums over."""
        ...

    @property
    def rotates(self) -> bool:
        """Whether the gradient of rhs may rotate both operands along the axes of `along`."""
        ...

    def contract_in_gradient(self, side: int) -> AxesOfBoth:
        """The axes that the gradient of a side sums over: of that of out, and of the other side."""
        ...

    def along(self, contract: AxesOfBoth, shape: tuple[int, ...], size: int) -> tuple[int, int]:
        """Of contracted axes, those along which groups of a size run in the two operands.

        The first operand has this shape. (-1, -1) if nothing is contracted.
        """
        ...

    def blocks(self, side: int, shape: tuple[int, ...], sizes: tuple[int, ...]) -> dict[int, int]:
        """2-D blocks of a side, by axis: one that the product sums over, and another one."""
        ...

    def run(self, lhs: Any, rhs: Any, arrays: Any) -> jax.Array:
        """The product of arrays or QTensors."""
        ...

    def run_gradient(self, side: int, gradient: Any, other: Any, like: Any, arrays: Any) -> Any:
        """The gradient of a side, an array of the shape of `like`."""
        ...


def check_product(lhs: Any, rhs: Any, config: Any, key: Any, scaling: Any) -> None:
    """Checks the arguments that all products have.

    Raises:
        ValueError: an operand is not a floating-point array, the config is not a ProductConfig, it
            needs a key, or it does not support `scaling`.
    """
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


@partial(jax.jit, static_argnames="operation")
def run_product(
    operation: Any,
    config: ProductConfig,
    lhs: jax.Array,
    rhs: jax.Array,
    key: jax.Array | None,
    scaling: DelayedScaling | None,
    arrays: Any = None,
) -> jax.Array:
    """The product, with its custom gradients.

    Args:
        operation: an `Operation`.
        config, lhs, rhs, key, scaling: as for `training.dot_general`.
        arrays: other arrays of the operation, without gradients.
    """
    return _product(operation, config, lhs, rhs, key, scaling, arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(operation: Operation, config: ProductConfig, lhs, rhs, key, scaling, arrays):
    return _run(operation, config, lhs, rhs, scaling, arrays)[0]


def _run(operation, config, lhs, rhs, scaling, arrays):
    """The product, and its quantized operands."""
    plans = _plan_out(operation, config, lhs, rhs)
    pairs = zip(plans, (lhs, rhs), _ranges(scaling, lhs, rhs), strict=True)
    operands = [plan.quantize(x, limit) for plan, x, limit in pairs]
    # With these of lhs, the product can be computed again without what came before it.
    operands[0] = name_codes(operands[0])
    return operation.run(*map(as_operand, operands), arrays), operands


def _plan_out(operation, config, lhs, rhs) -> list[Plan]:
    return _plans(operation, config, config.of_out, operation.contract, (lhs, rhs), (0, 1))


def _plan_gradient(operation, config, side, gradient, other) -> list[Plan]:
    """Plans of the gradient of out and of the other side, for the gradient of a side."""
    configs = config.of_rhs_gradient if side else config.of_lhs_gradient
    contract = operation.contract_in_gradient(side)
    rotation = config.rhs_gradient_rotation if side and operation.rotates else None
    sides = None, 1 - side
    return _plans(operation, config, configs, contract, (gradient, other), sides, rotation)


def _plans(operation, config, configs, contract, operands, sides, rotation=None):
    """Plans of both operands of a product."""
    sizes = [_group_size(of_x) for of_x in configs]
    longest = max(n if isinstance(n, int) else 0 for n in (*sizes, rotation))
    along = operation.along(contract, operands[0].shape, longest)
    found = []
    for x, of_x, axes, axis, side, size in zip(
        operands, configs, contract, along, sides, sizes, strict=True
    ):
        groups = {axis % max(x.ndim, 1): size} if size else {}
        if isinstance(size, tuple):
            groups = operation.blocks(side, x.shape, size)
        turned = (axis, rotation) if rotation is not None and axes else None
        covers = config.rounds_scales_up
        found.append(plan_operand(x.shape, of_x, axes, groups, turned, covers=covers))
    return found


def _group_size(config: ArrayConfig | None) -> int | tuple[Any, ...] | None:
    return None if config is None else config.group_size or config.format.group_size


def _forward(operation, config, lhs, rhs, key, scaling, arrays):
    out, operands = _run(operation, config, lhs, rhs, scaling, arrays)
    plans = _plan_out(operation, config, lhs, rhs)
    limits = _ranges(scaling, lhs, rhs)
    kept = []
    for place, x in enumerate((lhs, rhs)):
        _, plan = _plan_gradient(operation, config, 1 - place, out, x)
        codes = operands[place] if plan == plans[place] else plan.quantize(x, limits[place])
        is_named = place == 0 and codes is operands[0]
        kept.append(Residual.of(codes if is_named else name_codes(codes)))
    seen = None
    if scaling is not None:
        seen = _shared_amax(lhs, scaling.lhs), _shared_amax(rhs, scaling.rhs)
    like = jax.tree.map(_abstract, (lhs, rhs))
    return out, (*kept, _Static(like), seen, key, scaling, arrays)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """Shapes and dtypes of both operands."""

    like: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]


def _abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _backward(operation, config, kept, gradient):
    lhs, rhs, static, seen, key, scaling, arrays = kept
    key = key if config.rounds_stochastically else None
    limit = None if scaling is None else scaling.amax_limit(scaling.gradient, amax_of(gradient))

    def of_side(side, residual):
        like = static.like[side]
        plan, _ = _plan_gradient(operation, config, side, gradient, static.like[1 - side])
        operands = plan.quantize(gradient, limit, key), residual.restore()
        out = operation.run_gradient(side, *map(as_operand, operands), like, arrays)
        return out.astype(like.dtype)

    if scaling is not None:
        scaling = scaling.observed(*seen, _shared_amax(gradient, scaling.gradient))
    return of_side(0, rhs), of_side(1, lhs), None, scaling, None


_product.defvjp(_forward, _backward)


def _ranges(scaling, lhs, rhs):
    """The ends of the ranges of lhs and rhs by delayed scaling; None without it."""
    if scaling is None:
        return None, None
    return scaling.amax_limit(scaling.lhs, amax_of(lhs)), scaling.amax_limit(
        scaling.rhs, amax_of(rhs)
    )


def _shared_amax(x, history):
    """amax of x, over all devices of shard_map that share the history."""
    axes = varying_axes(x) - varying_axes(history)
    amax = amax_of(x)
    return lax.pmax(amax, tuple(sorted(axes))) if axes else amax


def transpose_product(
    function: Callable[[Any, Any], jax.Array],
    side: int,
    gradient: jax.Array | QTensor,
    other: jax.Array | QTensor,
    like: jax.ShapeDtypeStruct,
) -> jax.Array:
    """The gradient of a side of function(lhs, rhs), by JAX's rule, on codes where it can be.

    Args:
        function: a product of arrays of one dtype.
        side: 0 for lhs, 1 for rhs.
        gradient: that of the result.
        other: the other side.
        like: shape of the side.
    """
    dtype = jnp.promote_types(gradient.dtype, other.dtype)
    abstract = jax.ShapeDtypeStruct(like.shape, dtype)

    def transposed(gradient, other):
        def product(x):
            return function(other, x) if side else function(x, other)

        return jax.linear_transpose(product, abstract)(gradient)[0]

    return lift(transposed)(gradient.astype(dtype), other.astype(dtype))
