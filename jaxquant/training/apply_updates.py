"""Updates of parameters in 16 bits, without a copy in float32."""

from typing import Any

import jax
import jax.numpy as jnp

from ..core import bits_of, cast_stochastically, draw_seeds


def apply_updates(params: Any, updates: Any, key: jax.Array) -> Any:
    """`optax.apply_updates` that rounds bfloat16 and float16 parameters stochastically.

        parameter = round(parameter + update)        computed in float32

    Rounded to nearest, a bfloat16 parameter ignores updates below 0.2 to 0.4 % of its size. Rounded
    stochastically, it follows them on average, so that no float32 copy of it is needed.

    Args:
        params: tree of arrays.
        updates: tree like params, from an optax transformation; None leaves a parameter as it is.
            Compute it from float32 gradients: in bfloat16, averages of squares with b2 = 0.999
            do not change.
        key: random key, a different one in each step.

    Returns:
        The new parameters, in the dtypes of params. Parameters of 32 bits or more, and integers,
        are those of `optax.apply_updates`.

    Source: Gupta et al. 2015, arXiv:1502.02551, section 3.1.

    Example:
        >>> params, updates = jnp.ones(1000, jnp.bfloat16), jnp.full(1000, 1e-3)
        >>> (params + updates.astype(jnp.bfloat16)).mean()
        Array(1, dtype=bfloat16)
        >>> new = jq.training.apply_updates(params, updates, jax.random.key(0))
        >>> new.dtype.name, round(float(new.astype(jnp.float32).mean()), 3)
        ('bfloat16', 1.001)
    """
    leaves, treedef = jax.tree.flatten(params)
    seeds = draw_seeds(key, len(leaves))
    found = [
        leaf if change is None else _updated(leaf, change, seed)
        for leaf, change, seed in zip(leaves, treedef.flatten_up_to(updates), seeds, strict=True)
    ]
    return jax.tree.unflatten(treedef, found)


def _updated(leaf, change, seed):
    is_narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and bits_of(leaf.dtype) < 32
    if not is_narrow:
        return jnp.asarray(leaf + change, leaf.dtype)
    total = leaf.astype(jnp.float32) + change.astype(jnp.float32)
    return cast_stochastically(total, leaf.dtype, seed)
