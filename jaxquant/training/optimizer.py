"""8- and 4-bit optimizer states: the state of an optax transformation, stored as QTensors."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..core import ArrayConfig, Scheme, bits_of, draw_seeds, packed_bytes
from ..jaxprs import zero_results
from ..tree import Rule, Rules
from ..tree.internal import as_rules, leaves_with_paths, match_rules, unused_rules
from .blockwise import Blockwise, quantize_blocks, zero_blocks
from .power_formats import GRADIENT_8, POSITIVE_4, POSITIVE_8, SIGNED_4, SIGNED_8
from .state_update import update_in_parts
from .transformation import AnyTransformation, check_transformation

# Fields of optax states that are never negative, such as averages of squares.
_SQUARES = r"nu|nu_max|sum_of_squares|exp_avg_sq|grad_sum_sq|e_g|e_x|v_row|v_col"
# Partial sums and copies of parameters, which stay in float. Their errors would not decay, as those
# of moving averages do.
_COPIES = (
    r"acc_grads|z|x0|init_params|params0|init_particles|cumulative_gradients|projector"
    r"|diff_params_memory|diff_updates_memory"
)
# Names that parameters may have too, matched behind wrappers only. The v of adan is signed, that of
# adafactor is not (most of its arrays are in v_row and v_col), so v stays in float.
_SHORT_SQUARES = r"n"
_SHORT_COPIES = r"v|s|params|updates|grad|cache"
_WRAPPER = r"(\d+|\w*state|inner_states/[^/]+)"
# Path before a field of the state: wrappers and labels, but not another field, because names after
# a field are those of parameters, which may be called anything.
_AVERAGES = r"mu|trace|ema|m|m1|m2|g|exp_avg|grad_sum"
_FIELDS = rf"({_AVERAGES}|{_SQUARES}|{_COPIES}|{_SHORT_SQUARES}|{_SHORT_COPIES})"
_OUTER = rf"(inner_states/[^/]+/|(?!inner_states/|{_FIELDS}/)[^/]+/)*"
_POSITIVE = rf"re:{_OUTER}({_SQUARES})(/.*)?|({_WRAPPER}/)*({_SHORT_SQUARES})(/.*)?"
_EXACT = rf"re:{_OUTER}({_COPIES})(/.*)?|({_WRAPPER}/)*({_SHORT_COPIES})(/.*)?"


def _state_rules(signed, positive, length):
    """Rules for the field names of optax states."""
    of_signed, of_positive = (
        ArrayConfig(format=format, group_size=length) for format in (signed, positive)
    )
    return (
        Rule(_EXACT, None, required=False),
        Rule(_POSITIVE, of_positive, required=False),
        Rule("*", of_signed, required=False),
    )


# The mean of the gradients of some batches, in `optax.MultiSteps`. To use it, put it before others.
ACCUMULATOR_8_BIT = Rule(
    rf"re:{_OUTER}acc_grads(/.*)?", ArrayConfig(format=GRADIENT_8, group_size=128)
)
STATE_8_BIT = _state_rules(SIGNED_8, POSITIVE_8, 128)
STATE_4_BIT = _state_rules(SIGNED_4, POSITIVE_4, 128)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedState:
    """The state of a `quantized_state`. A pytree.

    Attributes:
        inner: state of the transformation, with a `Blockwise` in place of each array that the
            rules select.
        count: number of updates, int32. The noise of each update depends on it.

    Example:
        >>> state = jq.training.quantized_state(optax.adam(1e-3)).init({"w": jnp.zeros(8192)})
        >>> type(state).__name__, state.inner[0].nu["w"].q.format.bits
        ('QuantizedState', 8)
    """

    inner: Any
    count: jax.Array


def quantized_state(
    transformation: AnyTransformation,
    rules: Rules = STATE_8_BIT,
    *,
    rounds_stochastically: bool = True,
    key: jax.Array | None = None,
    min_size: int = 4096,
) -> AnyTransformation:
    """Wraps an optax transformation so that its state is stored in 8 or 4 bits between steps.

        updates, state = update(gradients, dequantize(state))        state = quantize(state)

    Each step computes in float exactly as the transformation does; then its state is rounded.

    Rounded to nearest, a moving average gets stuck once its updates are smaller than half a
    quantization step. With b2 = 0.999, Adam's second moment then does not follow gradients that
    shrink while the largest of their block do not: 2,700 steps after they fell tenfold, it is 7
    times too large. So states are rounded stochastically, with noise that is a function of the key
    and of the number of updates.

    Args:
        transformation: any `optax.GradientTransformation`, chains and wrappers included.
        rules: `STATE_8_BIT`, `STATE_4_BIT`, an ArrayConfig for every array, or rules as for
            `tree.quantize` for the paths of the state, such as "0/mu/layers/0/kernel"; the first
            match decides. The group size of a config is the largest number of elements per block
            (None: 128). The two constants are written for optax's field names: they store averages
            of squares without a sign and never as zero, and leave partial sums and copies of
            parameters in float. `(ACCUMULATOR_8_BIT, *STATE_8_BIT)` also stores the accumulated
            gradients of `optax.MultiSteps` in 8 bits. They do not suit `optax.sm3`, whose `nu` is
            an average of gradients.
        rounds_stochastically: whether states are rounded stochastically; False rounds to nearest.
        key: random key of the noise; None for `jax.random.key(0)`.
        min_size: arrays with fewer elements stay in float, as scalars do.

    Returns:
        A transformation of the same type. Its state is a `QuantizedState`.

    Raises:
        ValueError: the transformation does not have init and update, the rules are invalid, a key
            is given to round to nearest, or min_size is not positive; in `init`: a required rule
            matches nothing in the state, or as for `quantize`.

    Error: NaN or Inf in an array of the state makes its whole block NaN in the next step.
    Source: Dettmers et al. 2022, arXiv:2110.02861, section 2; 4 bits: Li et al. 2023,
        arXiv:2309.01507, sections 3 and 4, with powers instead of their codebook.

    Example:
        >>> params = {"kernel": jnp.zeros((64, 128))}
        >>> optimizer = jq.training.quantized_state(optax.adamw(1e-3))
        >>> jq.training.state_bytes(optax.adamw(1e-3).init(params))
        65540
        >>> jq.training.state_bytes(optimizer.init(params))
        16904
    """
    check_transformation(transformation)
    rules = _checked(rules, min_size)
    if key is not None and not rounds_stochastically:
        raise ValueError(
            f"key must be None with rounds_stochastically=False; got {key}. Leave out one of them."
        )

    def init(params):
        inner = transformation.init(params)
        _check_used(rules, inner)
        is_zero = zero_results(transformation.init, params)
        return QuantizedState(_store_first(inner, rules, min_size, is_zero), jnp.int32(0))

    select = partial(_configs_of, rules=rules, min_size=min_size)

    def update(updates, state, params=None, **extra):
        def run(updates, inner, params):
            return transformation.update(updates, inner, params, **extra)

        noise = None
        if rounds_stochastically:
            noise = jax.random.fold_in(jax.random.key(0) if key is None else key, state.count)
        count = len(jax.tree.leaves(state.inner, is_leaf=_is_stored))
        seeds = None if noise is None else draw_seeds(noise, count)
        found = update_in_parts(run, (updates, state.inner, params), select, seeds)
        if found is None:
            found = *run(updates, _restore(state.inner), params), {}
        updates, inner, ready = found
        inner = _store(inner, rules, min_size, seeds, ready)
        return updates, QuantizedState(inner, state.count + 1)

    # Of the same named tuple type, which optax checks.
    return transformation._replace(init=init, update=update)


def state_bytes(state: Any) -> int:
    """Returns the bytes of device memory that a tree of arrays, such as an optimizer state, takes.

    Args:
        state: pytree of arrays, abstract arrays (`jax.eval_shape`) and QTensors.

    Returns:
        The sum over the leaves, counting two 4-bit elements as one byte.

    Example:
        >>> jq.training.state_bytes({"a": jnp.zeros(8, jnp.int4), "b": jnp.zeros(8)})
        36
    """
    return sum(map(packed_bytes, jax.tree.leaves(state)))


def _checked(rules, min_size):
    """The rules as a tuple, after the arguments of `quantized_state` were checked."""
    if not isinstance(min_size, int) or min_size < 1:
        raise ValueError(
            f"min_size must be a positive number of elements; got {min_size!r}. With 1, every "
            "array is quantized."
        )
    if isinstance(rules, Scheme):
        raise ValueError(
            "rules must be an ArrayConfig, or rules for the paths of the state; got "
            f"{rules!r}. Pass the weights of the scheme."
        )
    return (Rule("*", rules),) if isinstance(rules, ArrayConfig) else as_rules(rules)


def _check_used(rules, inner):
    paths, leaves, _ = leaves_with_paths(inner, _is_box)
    found = unused_rules(rules, paths, leaves)
    if found:
        raise ValueError(
            f"No array of the state matches {[r.pattern for r in found]}; its paths are "
            f"{paths}. Correct the patterns, or pass required=False."
        )


def _store(inner, rules, min_size, seeds, ready):
    """The state with a Blockwise in place of each array that the rules select.

    Those in `ready` are quantized already, by place.
    """

    def stored(leaf, config, place):
        if place in ready:
            return ready[place]
        return quantize_blocks(leaf, config, None if seeds is None else seeds[place])

    return _map_selected(stored, inner, rules, min_size)


def _store_first(inner, rules, min_size, is_zero):
    """`_store` of the first state; is_zero says which arrays are zeros."""

    def stored(leaf, config, place):
        if is_zero[place]:
            return zero_blocks(leaf, config)
        return quantize_blocks(jax.lax.optimization_barrier(leaf), config)

    return _map_selected(stored, inner, rules, min_size)


def _map_selected(store, inner, rules, min_size):
    """Replaces each array that the rules select by `store(array, config, its place)`."""
    _, boxes, treedef = leaves_with_paths(inner, _is_box)
    found = []
    for place, (box, config) in enumerate(
        zip(boxes, _configs_of(inner, rules, min_size), strict=True)
    ):
        (leaf,), around = jax.tree.flatten(box)
        found.append(box if config is None else store(leaf, config, place).put_in(around))
    return jax.tree.unflatten(treedef, found)


def _configs_of(inner, rules, min_size):
    """The config that each array of the state is stored with, or None."""
    paths, boxes, _ = leaves_with_paths(inner, _is_box)
    leaves = [jax.tree.leaves(box)[0] for box in boxes]
    rules_of = match_rules(rules, paths, leaves)
    return [_config_of(leaf, rule, min_size) for leaf, rule in zip(leaves, rules_of, strict=True)]


def _restore(inner):
    return jax.tree.map(lambda x: x.restore() if _is_stored(x) else x, inner, is_leaf=_is_stored)


def _is_box(x: object) -> bool:
    """Whether x is a node around a single value, such as Flax's variables and their metadata."""
    children, _ = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
    is_single = jax.tree.structure(x).num_leaves == 1
    return is_single and [path for path, _ in children] == [(jax.tree_util.GetAttrKey("value"),)]


def _is_stored(x: object) -> bool:
    return isinstance(x, Blockwise)


def _config_of(leaf: Any, rule: Rule | None, min_size: int) -> ArrayConfig | None:
    """The config that a leaf is stored with, or None if it stays in float."""
    scheme = rule and rule.resolve()
    is_floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    if scheme is None or not is_floating or leaf.size < min_size or not leaf.ndim:
        return None
    config = scheme.weights
    return config if bits_of(leaf.dtype) > config.format.bits else None
