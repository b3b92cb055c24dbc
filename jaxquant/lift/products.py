"""Products, convolutions and lookups of a lifted function, by jaxquant's operations."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..core import LowRank
from ..jaxprs import Params, before_transpose
from ..ops import conv_general_dilated, dot_general, ragged_dot, take
from .carriers import transpose
from .parameter import Parameter, Unsupported

Operands = Sequence[Any]


def operand(x: Any) -> Any:
    """What an operation of jaxquant gets for a value."""
    return x.value if isinstance(x, Parameter) else x


def dot_general_rule(params: Params, operands: Operands, implementation: str | None) -> Any:
    """`lax.dot_general`."""
    lhs, rhs = operands
    if implementation is not None or isinstance(rhs, Parameter):
        return dot_general(operand(lhs), operand(rhs), **params, implementation=implementation)
    product = partial(dot_general, implementation=implementation)
    return swapped_dot_general(product, params, operand(lhs), rhs)


def swapped_dot_general(product: Callable[..., Any], params: Params, lhs: Any, rhs: Any) -> Any:
    """The product with the operands swapped, for products that expect parameters on the right.

    Args:
        product: a `dot_general`.
        params: those of the primitive.
        lhs: the parameter, rhs: the other operand.
    """
    ((lhs_contract, rhs_contract), (lhs_batch, rhs_batch)) = params["dimension_numbers"]
    numbers = (rhs_contract, lhs_contract), (rhs_batch, lhs_batch)
    batch = len(lhs_batch)
    lhs_free = lhs.ndim - batch - len(lhs_contract)
    rhs_free = rhs.ndim - batch - len(rhs_contract)
    axes = range(batch + lhs_free + rhs_free)
    order = (*axes[:batch], *axes[batch + rhs_free :], *axes[batch : batch + rhs_free])
    sharding = before_transpose(params["out_sharding"], order)
    swapped = {**params, "dimension_numbers": numbers, "out_sharding": sharding}
    return product(rhs, lhs, **swapped).transpose(order)


def convolution_rule(params: Params, operands: Operands, implementation: str | None) -> Any:
    """`lax.conv_general_dilated`."""
    lhs, rhs = (_without_adapters(x) for x in operands)
    return conv_general_dilated(lhs, rhs, **params, implementation=implementation)


def ragged_dot_rule(params: Params, operands: Operands, implementation: str | None) -> Any:
    """`lax.ragged_dot_general`, of rows in groups with one matrix each."""
    lhs, rhs, group_sizes = operands
    order = ragged_order(params)
    if not isinstance(rhs, Parameter):
        raise Unsupported("the ragged operand is quantized")
    q = transpose(rhs.qtensor(), order)
    return ragged_dot(
        operand(lhs),
        q,
        group_sizes,
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
        group_offset=params["group_offset"],
        implementation=implementation,
    )


def ragged_order(params: Params) -> tuple[int, ...]:
    """The axes of the matrices of `lax.ragged_dot_general` in the order (group, k, n).

    Raises:
        Unsupported: it is another product than `lax.ragged_dot`, up to the order of these axes.
    """
    numbers = params["ragged_dot_dimension_numbers"]
    (lhs_inner, rhs_inner), batch = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    is_ragged_dot = tuple(numbers.lhs_ragged_dimensions) == (0,) and len(groups) == 1
    if not is_ragged_dot or tuple(lhs_inner) != (1,) or len(rhs_inner) != 1 or any(batch):
        raise Unsupported("only rows in groups are multiplied with one matrix per group")
    return groups[0], rhs_inner[0], 3 - groups[0] - rhs_inner[0]


def _without_adapters(x):
    value = operand(x)
    if isinstance(value, LowRank):
        raise Unsupported("convolutions do not support adapters")
    return value


def gather_rule(params: Params, operands: Operands, implementation: str | None) -> Any:
    """`lax.gather` of whole slices along one axis: a lookup."""
    table, starts = operands
    if not isinstance(table, Parameter):
        raise Unsupported("it gathers by quantized indices")
    value, numbers = table.unchanged(), params["dimension_numbers"]
    axis = _lookup_axis(value.shape, params)
    index = starts[..., numbers.start_index_map.index(axis)]
    rows = take(
        value,
        index,
        axis,
        mode=_MODES[params["mode"]],
        unique_indices=params["unique_indices"],
        indices_are_sorted=params["indices_are_sorted"],
    )
    if params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        is_inside = _is_inside(starts, numbers.start_index_map, axis, value.shape[axis])
        lengths = (*(1,) * axis, *index.shape, *(1,) * (value.ndim - axis - 1))
        fill = jnp.nan if params["fill_value"] is None else params["fill_value"]
        rows = jnp.where(is_inside.reshape(lengths), rows, jnp.asarray(fill, rows.dtype))
    # The axes of the indices first, then those of the table, of which one has length 1 or is gone.
    rows = jnp.moveaxis(rows, range(axis, axis + index.ndim), range(index.ndim))
    if axis not in numbers.collapsed_slice_dims:
        rows = jnp.expand_dims(rows, index.ndim + axis)
    batch = (a for a in range(rows.ndim) if a not in numbers.offset_dims)
    return jnp.moveaxis(rows, range(rows.ndim), (*batch, *numbers.offset_dims))


def _lookup_axis(shape, params):
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    cut = [a for a, n in enumerate(shape) if sizes[a] != n or a in numbers.collapsed_slice_dims]
    if params["mode"] not in _MODES:
        raise Unsupported(f"its indices are brought into bounds by {params['mode']}")
    if numbers.operand_batching_dims:
        raise Unsupported("it gathers from a batch of tables")
    if len(cut) != 1 or sizes[cut[0]] != 1:
        raise Unsupported("it gathers parts that are not whole slices along one axis")
    if cut[0] not in numbers.start_index_map:
        raise Unsupported("no index selects along the axis that it gathers from")
    return cut[0]


def _is_inside(starts, index_map, axis, length):
    """Whether indices are in bounds; along axes that are gathered whole, only 0 is."""
    index = starts[..., index_map.index(axis)]
    is_inside = (index >= 0) & (index < length)
    for place, other in enumerate(index_map):
        if other != axis:
            is_inside &= starts[..., place] == 0
    return is_inside


# How `take` brings indices into bounds; what is outside is filled afterwards.
_MODES = {
    lax.GatherScatterMode.CLIP: "clip",
    lax.GatherScatterMode.PROMISE_IN_BOUNDS: "promise_in_bounds",
    lax.GatherScatterMode.FILL_OR_DROP: "clip",
}
