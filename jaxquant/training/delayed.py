"""Delayed scaling: scales from amax, the largest magnitude, in previous steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .amax import limit_from_history, push_amax
from .transformation import AnyTransformation, check_transformation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DelayedScaling:
    """Amax of the operands of one matrix multiplication in the last steps. A pytree.

        range of an operand = 2^margin * max(history)        values beyond it are clipped

    Keep it beside the parameters. `jax.grad` returns the amax observed in this step in its gradient
    slot: amax of each operand in the first element of its history, followed by zeros.
    `update_scaling` computes the next state from both. If one state serves several matrix
    multiplications, micro-batches or examples of vmap, JAX adds up their gradients; the sum is an
    upper bound of their amax.

    Attributes:
        lhs, rhs, gradient: float32 (length,), newest first; 0 where nothing was observed. While
            all are 0, the range is that of the operand itself.
        margin: the range exceeds the largest amax by a factor of 2^margin, static.

    Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3.1.

    Example:
        >>> scaling = jq.training.DelayedScaling.init(length=2)
        >>> def loss(w, scaling):
        ...     options = {"config": jq.training.FP8_TRAINING, "scaling": scaling}
        ...     return jnp.sum(jq.training.matmul(jnp.ones((1, 2)), w, **options))
        >>> _, observed = jax.grad(loss, argnums=(0, 1))(3 * jnp.ones((2, 1)), scaling)
        >>> jq.training.update_scaling(scaling, observed).rhs.tolist()
        [3.0, 0.0]
    """

    lhs: jax.Array
    rhs: jax.Array
    gradient: jax.Array
    margin: int = dataclasses.field(default=0, kw_only=True, metadata={"static": True})

    @classmethod
    def init(cls, length: int = 16, margin: int = 0) -> "DelayedScaling":
        """Returns the state before the first step.

        Args:
            length: number of steps that a history holds.
            margin: as the attribute.

        Raises:
            ValueError: length is not positive.
        """
        if length < 1:
            raise ValueError(f"length must be a positive number of steps; got {length}.")
        return cls(*(jnp.zeros(length, jnp.float32) for _ in range(3)), margin=margin)

    def update(self, gradient: "DelayedScaling") -> "DelayedScaling":
        """Returns the state for the next step, given this state's gradient."""
        pairs = zip(self._histories(), gradient._histories(), strict=True)
        return DelayedScaling(*(push_amax(h, g[..., 0]) for h, g in pairs), margin=self.margin)

    def observed(self, lhs: jax.Array, rhs: jax.Array, gradient: jax.Array) -> "DelayedScaling":
        """Returns the gradient of this state, given amax of each operand."""
        pairs = zip(self._histories(), (lhs, rhs, gradient), strict=True)
        return DelayedScaling(
            *(jnp.zeros_like(h).at[0].set(amax) for h, amax in pairs), margin=self.margin
        )

    def amax_limit(self, history: jax.Array, amax: jax.Array) -> jax.Array:
        """Returns the end of an operand's range, given its history and its amax in this step."""
        return limit_from_history(history, amax) * 2.0**self.margin

    def _histories(self):
        return self.lhs, self.rhs, self.gradient


def update_scaling(params: Any, gradients: Any) -> Any:
    """Advances every `DelayedScaling` in a tree by one step.

    Args:
        params: any pytree that contains `DelayedScaling`s, or one of them.
        gradients: their gradients from `jax.grad`.

    Returns:
        params with the next state in place of each `DelayedScaling`; other leaves are unchanged.

    Raises:
        ValueError: params does not contain a `DelayedScaling`.

    Example:
        >>> params = {"w": jnp.ones(2), "scaling": jq.training.DelayedScaling.init(2)}
        >>> gradients = jax.tree.map(jnp.ones_like, params)
        >>> jq.training.update_scaling(params, gradients)["scaling"].lhs.tolist()
        [1.0, 0.0]
    """
    if not any(map(_is_scaling, jax.tree.leaves(params, is_leaf=_is_scaling))):
        raise ValueError(
            "update_scaling expects a tree that contains DelayedScaling; got "
            f"{jax.tree.structure(params)}. Put DelayedScaling.init() beside the parameters."
        )
    return jax.tree.map(
        lambda x, gradient: x.update(gradient) if _is_scaling(x) else x,
        params,
        gradients,
        is_leaf=_is_scaling,
    )


def skip_scaling(transformation: AnyTransformation) -> AnyTransformation:
    """Wraps an optimizer so that it ignores every `DelayedScaling` in a tree.

        updates, state = skip_scaling(optax.adamw(1e-3)).update(gradients, state, params)
        params = update_scaling(optax.apply_updates(params, updates), gradients)

    Args:
        transformation: any `optax.GradientTransformation`.

    Returns:
        A transformation of the same type. Its state holds nothing for a `DelayedScaling`, norms and
        averages do not include one, and the update of one is zero.

    Raises:
        ValueError: the transformation does not have init and update.

    Example:
        >>> params = {"w": jnp.ones(2), "scaling": jq.training.DelayedScaling.init(2)}
        >>> optimizer = jq.training.skip_scaling(optax.adamw(1e-3))
        >>> optimizer.init(params)[0].mu["scaling"] is None
        True
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


def _without_scaling(tree: Any) -> Any:
    """The tree with None, which is not a leaf, in place of each state."""
    return jax.tree.map(lambda x: None if _is_scaling(x) else x, tree, is_leaf=_is_scaling)


def _is_scaling(x: object) -> bool:
    return isinstance(x, DelayedScaling)
