"""What `train_products` does with products, and with loops over parameters."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ..jaxprs import varying_axes
from ..lift.internal import (
    Equation,
    Parameter,
    Unsupported,
    is_tagged,
    ragged_order,
    scan_rule,
    swapped_dot_general,
    tagged_rules,
)
from .conv_product import conv_general_dilated
from .dot import dot_general
from .product_config import ProductConfig
from .product_rules import ProductRule
from .ragged_product import ragged_dot


@dataclasses.dataclass(frozen=True, eq=False)
class Tag:
    """The rule of a parameter. Tags are equal if their configs are."""

    rule: ProductRule

    @property
    def config(self) -> ProductConfig:
        """Of the products."""
        config = self.rule.config
        assert config is not None
        return config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tag) and other.config == self.config

    def __hash__(self) -> int:
        return hash(self.config)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Stack:
    """In place of the state of a parameter: the loops that slice it, by their lengths."""

    lengths: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Products:
    """The rules of products with a tagged operand.

    Attributes:
        numbers: the number of the next product, for its random key.
        used: rules whose parameters were operands of a product.
        stacks: for each operand of a product with a `Stack`, by path, the lengths of its loops.
    """

    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    used: set[ProductRule] = dataclasses.field(default_factory=set)
    stacks: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def rules(self) -> dict[str, Any]:
        """All rules, by the name of the primitive."""
        return tagged_rules(
            {
                "dot_general": self._dot_general,
                "conv_general_dilated": self._convolution,
                "ragged_dot_general": self._ragged_dot,
                "scan": _scan,
            }
        )

    def _options(self, equation: Equation, x: Parameter, other: Any) -> dict[str, Any]:
        """Arguments of a product of a parameter and an array."""
        if not jnp.issubdtype(other.dtype, jnp.floating):
            raise Unsupported(f"the other operand is {other.dtype}")
        self.used.add(x.value.tag.rule)
        key, state = equation.options.key, x.value.extra
        if isinstance(state, Stack):
            self.stacks[x.path] = state.lengths
            state = None
        if key is not None:
            key = jax.random.fold_in(key, next(self.numbers))
            for name in sorted(varying_axes(other) | varying_axes(x.value.array)):
                key = jax.random.fold_in(key, jax.lax.axis_index(name))
        return {"config": x.value.tag.config, "key": key, "scaling": state}

    def _dot_general(self, equation, operands):
        lhs, rhs = operands
        is_right = is_tagged(rhs)
        x, other = (rhs, lhs) if is_right else (lhs, rhs)
        other = _array(other)
        product = functools.partial(dot_general, **self._options(equation, x, other))
        if is_right:
            out = product(other, x.value.array, **equation.params)
        else:
            out = swapped_dot_general(product, equation.params, x.value.array, other)
        return _results(equation, out)

    def _convolution(self, equation, operands):
        lhs, rhs = operands
        params = dict(equation.params)
        if not is_tagged(rhs):
            raise Unsupported("it is convolved with a kernel that no rule selects")
        if params.pop("out_sharding", None) is not None:
            raise Unsupported("its result has an explicit sharding")
        lhs = _array(lhs)
        options = self._options(equation, rhs, lhs)
        return _results(equation, conv_general_dilated(lhs, rhs.value.array, **params, **options))

    def _ragged_dot(self, equation, operands):
        lhs, rhs, group_sizes = operands
        params = equation.params
        order = ragged_order(params)
        if not is_tagged(rhs) or params["group_offset"] is not None:
            raise Unsupported("only matrices without an offset of groups are quantized")
        lhs = _array(lhs)
        out = ragged_dot(
            lhs,
            rhs.value.array.transpose(order),
            group_sizes,
            params["precision"],
            params["preferred_element_type"],
            **self._options(equation, rhs, lhs),
        )
        return _results(equation, out)


def _array(x):
    if isinstance(x, Parameter) and not is_tagged(x):
        raise Unsupported("the other operand is quantized")
    return x.value.array if isinstance(x, Parameter) else jnp.asarray(x)


def _results(equation, out):
    return [out.astype(equation.eqn.outvars[0].aval.dtype)]


def _scan(equation, operands):
    """`lax.scan`, whose slices of a parameter have one state each, or share one."""
    first = equation.count_before_slices()
    xs = [_with_stacked_state(x) for x in operands[first:]]
    return scan_rule(equation, [*operands[:first], *xs])


def _with_stacked_state(x):
    if not is_tagged(x) or x.value.extra is None:
        return x
    state, length = x.value.extra, x.value.array.shape[0]
    if isinstance(state, Stack):
        stack = Stack((*state.lengths, length))
        return x.derive(dataclasses.replace(x.value, extra=stack))
    if state.lhs.ndim == 1:
        state = jax.tree.map(lambda h: jnp.broadcast_to(h, (length, *h.shape)), state)
    if state.lhs.shape[0] != length:
        raise ValueError(
            f"scaling of {x.path} must have one state per slice, {length}; got "
            f"{state.lhs.shape[0]}. Make it with init_scaling(fn, rules, params, *args)."
        )
    return x.derive(dataclasses.replace(x.value, extra=state))
