"""A policy for rematerialization that keeps quantized operands."""

from typing import Any

import jax

from .operand import CODES

_policy = jax.checkpoint_policies.save_only_these_names(CODES)


def save_codes(*args: Any, **params: Any) -> Any:
    """A policy of `jax.checkpoint` that saves the codes of quantized products, and nothing else.

        jax.checkpoint(block, policy=training.save_codes)

    The backward pass recomputes each product from the codes of its operands, without those before
    it, and everything between products. So a block keeps 8-bit or 4-bit codes and their scales in
    place of the activations in float. Codes of an activation are saved once if both products that
    it is an operand of have the same (one scale per tensor), and else once for each of them.

    Args:
        args, params: a primitive, its operands and parameters, as JAX calls policies.

    Returns:
        Whether the results of the primitive are saved.

    Source: Chen et al. 2021 (ActNN), arXiv:2104.14129, section 3; Chen et al. 2016,
        arXiv:1604.06174.

    Example:
        >>> def block(w, x):
        ...     return jnp.tanh(jq.training.matmul(x, w, config=jq.training.FP8_TRAINING))
        >>> saving = jax.checkpoint(block, policy=jq.training.save_codes)
        >>> _, pull = jax.vjp(saving, jnp.ones((4, 4)), jnp.ones((2, 4)))
        >>> {x.dtype.itemsize for x in jax.tree.leaves(pull) if x.shape == (2, 4)}
        {1}
    """
    return _policy(*args, **params)
