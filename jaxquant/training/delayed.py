"""Scales from the steps before: histories of amax, the largest magnitude of an array."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..core import largest_magnitude
from .transformation import AnyTransformation, check_transformation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DelayedScaling:
    """What the operands of one product have been like in the last steps. A pytree.

        range of an operand = 2^margin * max(history)        what lies beyond it is clipped

    It goes with the parameters, and `jax.grad` says in the place of its gradient what a step has
    seen: amax of each operand as the first element of the history, and zeros. `update_scaling`
    makes the next state of both. JAX adds gradients up where one state serves several products,
    micro-batches or examples of vmap; the sum is an upper bound of their amax.

    Attributes:
        lhs, rhs, gradient: float32 (length,), the newest first; 0 where nothing was seen. While
            all are 0, the range is that of the operand itself.
        margin: powers of two that the range leaves above the largest amax, static.

    Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3.1.
    """

    lhs: jax.Array
    rhs: jax.Array
    gradient: jax.Array
    margin: int = dataclasses.field(default=0, kw_only=True, metadata={"static": True})

    @classmethod
    def init(cls, length: int = 16, margin: int = 0) -> "DelayedScaling":
        """The state before the first step.

        Args:
            length: steps that a history looks back.
            margin: as the attribute.

        Raises:
            ValueError: length is not positive.
        """
        if length < 1:
            raise ValueError(f"length must be a positive number of steps; got {length}.")
        return cls(*(jnp.zeros(length, jnp.float32) for _ in range(3)), margin=margin)

    def update(self, gradient: "DelayedScaling") -> "DelayedScaling":
        """The state for the next step, from what is in the place of this one's gradient."""
        pairs = zip(self._histories(), gradient._histories(), strict=True)
        return DelayedScaling(*(push_amax(h, g[..., 0]) for h, g in pairs), margin=self.margin)

    def seen(self, lhs: jax.Array, rhs: jax.Array, gradient: jax.Array) -> "DelayedScaling":
        """What stands in the place of the gradient: amax of each operand."""
        pairs = zip(self._histories(), (lhs, rhs, gradient), strict=True)
        return DelayedScaling(
            *(jnp.zeros_like(h).at[0].set(amax) for h, amax in pairs), margin=self.margin
        )

    def reach(self, history: jax.Array, amax: jax.Array) -> jax.Array:
        """The end of the range of an operand with that history and, in this step, that amax."""
        known = jnp.max(history)
        return jnp.where(known > 0, known, amax) * 2.0**self.margin

    def _histories(self):
        return self.lhs, self.rhs, self.gradient


def amax_of(x: jax.Array) -> jax.Array:
    """max|x| in float32: 0 where x has no element, and inf if one is not finite."""
    return largest_magnitude(x.astype(jnp.float32), tuple(range(x.ndim))).reshape(())


def push_amax(history: jax.Array, amax: jax.Array) -> jax.Array:
    """The history after one more step, the newest first: (..., length) and (...).

    An amax that is not finite says nothing of the next step, and counts as 0: not seen.
    """
    newest = jnp.where(jnp.isfinite(amax), amax, 0)
    return jnp.roll(history, 1, -1).at[..., 0].set(newest)


def update_scaling(params: Any, gradients: Any) -> Any:
    """Moves every `DelayedScaling` of a tree on by one step.

    Args:
        params: any pytree that holds `DelayedScaling`s, or one of them.
        gradients: what `jax.grad` returns for it.

    Returns:
        params with the next state in the place of each, all else as it is.

    Raises:
        ValueError: params holds none.
    """
    if not any(map(_is_scaling, jax.tree.leaves(params, is_leaf=_is_scaling))):
        raise ValueError(
            "update_scaling takes a tree that holds DelayedScaling; got "
            f"{jax.tree.structure(params)}. Put DelayedScaling.init() beside the parameters."
        )
    return jax.tree.map(
        lambda x, gradient: x.update(gradient) if _is_scaling(x) else x,
        params,
        gradients,
        is_leaf=_is_scaling,
    )


def skip_scaling(transformation: AnyTransformation) -> AnyTransformation:
    """An optimizer that does not see the `DelayedScaling`s of a tree.

        updates, state = skip_scaling(optax.adamw(1e-3)).update(gradients, state, params)
        params = update_scaling(optax.apply_updates(params, updates), gradients)

    Args:
        transformation: any `optax.GradientTransformation`.

    Returns:
        The same kind of transformation. Its state has nothing for a `DelayedScaling`, no norm or
        average counts one, and its update of one is zero.

    Raises:
        ValueError: the transformation has no init and update.
    """
    check_transformation(transformation)

    def init(params):
        return transformation.init(_without_scaling(params))

    def update(updates, state, params=None, **extra):
        others = _without_scaling(updates), state, _without_scaling(params)
        found, state = transformation.update(*others, **extra)
        found = jax.tree.map(
            lambda x, other: jax.tree.map(jnp.zeros_like, x) if _is_scaling(x) else other,
            updates,
            found,
            is_leaf=_is_scaling,
        )
        return found, state

    return transformation._replace(init=init, update=update)


def _without_scaling(tree):
    """The tree with None, which is no leaf, in the place of each state."""
    return jax.tree.map(lambda x: None if _is_scaling(x) else x, tree, is_leaf=_is_scaling)


def _is_scaling(x):
    return isinstance(x, DelayedScaling)
