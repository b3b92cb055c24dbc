"""`train_products`: the products of any function, quantized in training by rules."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..lift.internal import (
    Options,
    Parameter,
    Tagged,
    as_array,
    evaluate,
    find_uses,
    is_input,
    is_quantized,
    trace_function,
    view_of,
)
from ..tree.internal import leaves_with_paths
from .delayed import DelayedScaling
from .product_config import ProductConfig
from .product_rules import ProductRule, ProductRules, as_product_rules, choose
from .tagged_products import Products, Stack, Tag


def train_products(
    fn: Callable[..., Any],
    rules: ProductRules,
    *,
    key: jax.Array | None = None,
    scaling: Mapping[str, DelayedScaling] | None = None,
) -> Callable[..., Any]:
    """Transforms a function so that products with its parameters are quantized in training.

        train_products(fn, rules)(params, x) ~ fn(params, x), and so are its gradients

    Matrix multiplications, convolutions and ragged products that a selected parameter is an operand
    of run as `training.dot_general`, `conv_general_dilated` and `ragged_dot`, with the parameter as
    rhs, whatever library they come from. The model is not changed: `fn` is traced, and the trace is
    evaluated. Parameters may be transposed, reshaped, sliced, cast and scaled first, and pass
    through jit, scan, while_loop, cond, checkpoint, shard_map and vmap. Everything else runs as it
    is, in float: products without a selected parameter, lookups, and functions with their own
    derivative (`jax.custom_vjp`).

    Differentiate the transformed function, not the other way round:

        jax.grad(train_products(loss, rules, key=key))(params, batch)

    Args:
        fn: a function whose first argument holds the parameters, any pytree of arrays.
        rules: which parameters, by path, and how: {pattern: config}, or pairs, of which the first
            that matches decides; or one config for all. None as a config leaves products in float:
            {"embed*": None, "head*": None, "*": FP8_TRAINING}. Patterns are those of
            `jaxquant.Rule`.
        key: random key, required if a config rounds stochastically. Pass a different one in each
            step. Each product, step of a scan and device of a shard_map (with check_vma) derives
            its own.
        scaling: {path: DelayedScaling} from `init_scaling`, for delayed scaling; None, or without a
            path, ranges are computed from the operands. Gradients with respect to it are the
            observed amax, see `DelayedScaling`.

    Returns:
        Function with the signature of fn. Quantized arguments are treated as by `lift`.

    Raises:
        ValueError: fn is not a function, the rules are not valid, or a key is missing; or, from the
            transformed function: a rule matches no parameter, or only parameters that are not
            operands of a product; scaling names another path; or as for the products.

    Gradients: those of `dot_general`: rounding counts as the identity.
    Error: with rules of None, results equal those of fn bit for bit, if both run under `jax.jit`.
    Source: Wortsman et al. 2023 (SwitchBack), arXiv:2304.13013, and the sources of the configs.

    Example:
        >>> def loss(params, x):
        ...     return jnp.sum(jax.nn.relu(x @ params["up"]) @ params["down"])
        >>> params = {"up": jnp.eye(4), "down": jnp.ones((4, 1))}
        >>> rules = {"down": None, "*": jq.training.SWITCHBACK}
        >>> gradient = jax.grad(jq.training.train_products(loss, rules))
        >>> gradient(params, jnp.ones((2, 4)))["down"].round(2).tolist()
        [[2.0], [2.0], [2.0], [2.0]]
    """
    if not callable(fn):
        raise ValueError(
            "train_products expects a function, as in train_products(loss, rules); got "
            f"{type(fn).__name__}."
        )
    checked = as_product_rules(rules)
    if key is None and any(c is not None and c.rounds_stochastically for _, c in checked):
        raise ValueError(
            "key must be a random key, because a config of the rules rounds stochastically; got "
            f"{key}. Write train_products(fn, rules, key=key), with another key in each step."
        )

    @functools.wraps(fn)
    def trained(params, *args, **kwargs):
        call = _Call(fn, checked, params, args, kwargs)
        out, products = call.run(call.inputs, call.states(scaling), key)
        call.check(products.used)
        return call.trace.result(out)

    return trained


def init_scaling(
    fn: Callable[..., Any],
    rules: ProductRules,
    params: Any,
    *args: Any,
    length: int = 16,
    margin: int = 0,
) -> dict[str, DelayedScaling]:
    """The states of delayed scaling for `train_products`, before the first step.

    Args:
        fn, rules: as for `train_products`.
        params, args: arguments of fn, arrays or `jax.ShapeDtypeStruct`s. Nothing is computed.
        length, margin: as for `DelayedScaling.init`.

    Returns:
        {path: DelayedScaling} for each parameter whose rule has one scale per tensor. If `scan`
        slices the parameter, there is one state per slice, in the same order.

    Raises:
        ValueError: as for `train_products`; or no rule has a config with one scale per tensor.

    Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3.1.

    Example:
        >>> params = {"layers": jnp.ones((3, 4, 4))}
        >>> def fn(params, x):
        ...     return jax.lax.scan(lambda x, w: (x @ w, None), x, params["layers"])[0]
        >>> states = jq.training.init_scaling(
        ...     fn, jq.training.FP8_TRAINING, params, jnp.ones((2, 4)), length=5
        ... )
        >>> states["layers"].lhs.shape
        (3, 5)
    """
    call = _Call(fn, as_product_rules(rules), params, args, {})
    states = {
        path: Stack()
        for path, rule in zip(call.paths, call.chosen, strict=True)
        if rule is not None and _supports_delayed(rule.config)
    }
    found: list[Products] = []

    def record(inputs):
        out, products = call.run(inputs, states, jax.random.key(0))
        found.append(products)
        return out

    jax.eval_shape(record, call.inputs)
    stacks = found[0].stacks
    if not stacks:
        raise ValueError(
            "init_scaling needs a rule with one scale per tensor, such as training.FP8_TRAINING, "
            f"for a parameter that is an operand of a product; got {rules!r}."
        )
    first = DelayedScaling.init(length, margin)
    return {
        path: jax.tree.map(lambda h, stack=stack: jnp.zeros((*stack, *h.shape), h.dtype), first)
        for path, stack in stacks.items()
    }


def _supports_delayed(config: ProductConfig | None) -> bool:
    if config is None:
        return False
    try:
        config.check_delayed()
    except ValueError:
        return False
    return True


class _Call:
    """One call of a function: its trace, and which of its inputs are selected.

    Attributes:
        paths, shapes, chosen: of each leaf of the parameters: its path, shape, and rule or None.
        trace: of the function.
        inputs: of the trace.
    """

    def __init__(self, fn, rules, params, args, kwargs):
        self.paths, leaves, _ = leaves_with_paths(params)
        self.chosen = choose(rules, self.paths, leaves)
        self.shapes = [getattr(x, "shape", ()) for x in leaves]
        _, self._leaves, treedef = leaves_with_paths(((params, *args), kwargs))
        is_abstract = [isinstance(x, jax.ShapeDtypeStruct) for x in self._leaves]
        pairs = zip(self._leaves, is_abstract, strict=True)
        self._places = [i for i, (x, b) in enumerate(pairs) if b or is_input(x)]
        self.inputs = [self._leaves[i] for i in self._places]
        self.trace = trace_function(fn, self._leaves, treedef, self._places)
        self._rules = rules

    def states(self, scaling: Mapping[str, DelayedScaling] | None) -> Mapping[str, Any]:
        """The states of delayed scaling, checked."""
        scaling = {} if scaling is None else scaling
        selected = {
            p for p, r in zip(self.paths, self.chosen, strict=True) if r is not None and r.config
        }
        unknown = sorted(set(scaling) - selected)
        if unknown:
            raise ValueError(
                f"scaling must be for parameters that the rules select, {sorted(selected)}; got "
                f"{unknown}. Make it with init_scaling(fn, rules, params, *args)."
            )
        return scaling

    def run(
        self, inputs: list[Any], states: Mapping[str, Any], key: jax.Array | None
    ) -> tuple[list[Any], Products]:
        """The results of the trace, and a record of its products."""
        products = Products()
        options = Options(False, None, products.rules(), key)
        pairs = zip(self._places, inputs, strict=True)
        values = [self._value(i, x, states) for i, x in pairs]
        out = evaluate(self.trace.program, values, options)
        return [_returned(x, options) for x in out], products

    def _value(self, i, x, states):
        """An input; selected parameters are tagged with their rule."""
        is_parameter = i < len(self.paths)
        rule = self.chosen[i] if is_parameter else None
        path = self.paths[i] if is_parameter else f"argument {i}"
        if is_quantized(x):
            return Parameter(x, path, is_whole=True)
        if rule is None or rule.config is None:
            return x
        return Parameter(Tagged(jnp.asarray(x), states.get(path), tag=Tag(rule)), path)

    def check(self, used: set[ProductRule]) -> None:
        """Checks that each rule with a config selects an operand of a product."""
        for rule in self._rules:
            paths = [p for p, r in zip(self.paths, self.chosen, strict=True) if r is rule]
            if rule.config is None or rule in used or not paths:
                continue
            uses = [f"{path} ({', '.join(self._primitives(path)) or 'not used'})" for path in paths]
            raise ValueError(
                f"Each rule must select an operand of a product; got {rule.rule.pattern!r}, which "
                f"selects {', '.join(uses[:4])}. Use None as its config, or drop it."
            )

    def _primitives(self, path):
        return dict.fromkeys(use.primitive for name, use in self._uses() if name == path)

    def _uses(self):
        views = [
            view_of(self.paths[i], self.shapes[i]) if i < len(self.paths) else None
            for i in self._places
        ]
        return find_uses(self.trace.program, views)


def _returned(x, options):
    if isinstance(x, Parameter) and x.is_whole:
        return x.value
    return as_array(x, None, "the function returns another form of it", options)
