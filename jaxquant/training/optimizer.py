"""Optimizer states in few bits: what an optax transformation remembers, stored as QTensors."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..core import ArrayConfig, Scheme, bits_of, packed_bytes
from ..tree import Rule, Rules
from ..tree.internal import as_rules, leaves_with_paths, match_rules, unused_rules
from .blockwise import Blockwise, quantize_blocks
from .power_formats import POSITIVE_4, POSITIVE_8, SIGNED_4, SIGNED_8
from .transformation import AnyTransformation, check_transformation

# What optax calls averages of squares, and what else is never negative.
_SQUARES = r"nu|nu_max|sum_of_squares|exp_avg_sq|grad_sum_sq|e_g|e_x|v_row|v_col"
# Sums that are not finished, and copies of parameters. They do not forget errors, as averages do.
_COPIES = (
    r"acc_grads|z|x0|init_params|params0|init_particles|cumulative_gradients|projector"
    r"|diff_params_memory|diff_updates_memory"
)
# Names that parameters have, too, count only behind wrappers. A v has a sign in adan and none in
# adafactor, where most arrays are in v_row and v_col instead, and is left as it is.
_SHORT_SQUARES = r"n"
_SHORT_COPIES = r"v|s|params|updates|grad|cache"
_WRAPPER = r"(\d+|\w*state|inner_states/[^/]+)"
# Before a field of the state: wrappers and labels, but no other field, since what follows that one
# names parameters, and these may be called anything.
_AVERAGES = r"mu|trace|ema|m|m1|m2|g|exp_avg|grad_sum"
_FIELDS = rf"({_AVERAGES}|{_SQUARES}|{_COPIES}|{_SHORT_SQUARES}|{_SHORT_COPIES})"
_OUTER = rf"(inner_states/[^/]+/|(?!inner_states/|{_FIELDS}/)[^/]+/)*"
_POSITIVE = rf"re:{_OUTER}({_SQUARES})(/.*)?|({_WRAPPER}/)*({_SHORT_SQUARES})(/.*)?"
_EXACT = rf"re:{_OUTER}({_COPIES})(/.*)?|({_WRAPPER}/)*({_SHORT_COPIES})(/.*)?"


def _state_rules(signed, positive, length):
    """Rules for the names that optax uses."""
    of_signed, of_positive = (
        ArrayConfig(format=format, axis=-1, group_size=length) for format in (signed, positive)
    )
    return (
        Rule(_EXACT, None, required=False),
        Rule(_POSITIVE, of_positive, required=False),
        Rule("*", of_signed, required=False),
    )


STATE_8_BIT = _state_rules(SIGNED_8, POSITIVE_8, 256)
STATE_4_BIT = _state_rules(SIGNED_4, POSITIVE_4, 128)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedState:
    """The state of a `quantized_state`. A pytree.

    Attributes:
        inner: state of the transformation, with a `Blockwise` in place of each array that the
            rules select.
        key: random key of the next step; None where rounding is to nearest.
    """

    inner: Any
    key: jax.Array | None = None


def quantized_state(
    transformation: AnyTransformation,
    rules: Rules = STATE_8_BIT,
    *,
    key: jax.Array | None = None,
    min_size: int = 4096,
) -> AnyTransformation:
    """An optax transformation whose state is stored in 8 bits, or in 4, between its steps.

        updates, state = update(gradients, dequantize(state))        state = quantize(state)

    Each step computes as the transformation does; what it remembers is rounded afterwards.

    Args:
        transformation: any `optax.GradientTransformation`, chains and wrappers included.
        rules: for the paths of the state, such as "0/mu/layers/0/kernel": `STATE_8_BIT`,
            `STATE_4_BIT`, an ArrayConfig for all, or rules as for `tree.quantize`, of which the
            first that matches decides. Of a config, the group size is the number of elements per
            block (None: 256), and the axis is not used. The two constants know optax's names: they
            store averages of squares without a sign and so that none becomes zero, and leave
            sums that are not finished (`optax.MultiSteps`) and copies of parameters as they are.
            They are not for `optax.sm3`, whose `nu` is an average of gradients.
        key: random key for stochastic rounding, kept in the state; None rounds to nearest. With
            4 bits give one: to nearest, averages stay where they are while they change by less
            than half a step, which costs several percent of the loss.
        min_size: arrays with fewer elements stay as they are.

    Returns:
        The transformation, of the same type. Its state is a `QuantizedState`.

    Raises:
        ValueError: the transformation has no init and update, rules are none, min_size is not
            positive; in `init`, a required rule matches nothing in the state, or as for `quantize`.

    Error: NaN or Inf in an array of the state makes all of its block NaN in the next step.
    Source: Dettmers et al. 2022, arXiv:2110.02861, section 2; 4 bits: Li et al. 2023,
        arXiv:2309.01507, sections 3 and 4, with powers for their codes.
    """
    check_transformation(transformation)
    rules = _checked(rules, min_size)

    def init(params):
        inner = transformation.init(params)
        _check_used(rules, inner)
        return QuantizedState(_store(inner, rules, min_size, None), key)

    def update(updates, state, params=None, **extra):
        later, now = (None, None) if state.key is None else jax.random.split(state.key)
        updates, inner = transformation.update(updates, _restore(state.inner), params, **extra)
        return updates, QuantizedState(_store(inner, rules, min_size, now), later)

    # Of the type that it is, so that optax, which is not imported here, knows it.
    return transformation._replace(init=init, update=update)


def state_bytes(state: Any) -> int:
    """Bytes in device memory of all arrays of a tree, such as the state of an optimizer.

    Args:
        state: pytree of arrays, abstract ones (`jax.eval_shape`), and QTensors.

    Returns:
        The sum over the leaves, where elements of 4 bits lie two to a byte.
    """
    return sum(map(packed_bytes, jax.tree.leaves(state)))


def _checked(rules, min_size):
    """The rules, if all is as `quantized_state` wants it."""
    if not isinstance(min_size, int) or min_size < 1:
        raise ValueError(
            f"min_size must be a positive number of elements; got {min_size!r}. 1 stores all "
            "arrays quantized."
        )
    if isinstance(rules, Scheme):
        raise ValueError(
            "rules must be for the paths of the state, or one ArrayConfig; got "
            f"{rules!r}. Of a Scheme, pass its weights."
        )
    return (Rule("*", rules),) if isinstance(rules, ArrayConfig) else as_rules(rules)


def _check_used(rules, inner):
    paths, leaves, _ = leaves_with_paths(inner, None)
    found = unused_rules(rules, paths, leaves)
    if found:
        raise ValueError(
            f"No array of the state matches {[r.pattern for r in found]}; its paths are "
            f"{paths}. Correct the patterns, or pass required=False."
        )


def _store(inner, rules, min_size, key):
    """The state with a Blockwise in place of each array that the rules select."""
    paths, leaves, treedef = leaves_with_paths(inner, None)
    stored = []
    for i, (leaf, rule) in enumerate(zip(leaves, match_rules(rules, paths, leaves), strict=True)):
        config = _config_of(leaf, rule, min_size)
        noise = None if key is None else jax.random.fold_in(key, i)
        stored.append(leaf if config is None else quantize_blocks(leaf, config, noise))
    return jax.tree.unflatten(treedef, stored)


def _restore(inner):
    return jax.tree.map(lambda x: x.dequantize() if _is_stored(x) else x, inner, is_leaf=_is_stored)


def _is_stored(x):
    return isinstance(x, Blockwise)


def _config_of(leaf, rule, min_size):
    """The config by which a leaf is stored, or None if it stays as it is."""
    scheme = rule and rule.resolve()
    is_floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    if scheme is None or leaf.size < min_size or not is_floating:
        return None
    config = scheme.weights
    return config if bits_of(leaf.dtype) > config.format.bits else None
