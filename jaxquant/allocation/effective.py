"""The weight that a quantized parameter stands for, with what changes its activations undone."""

import jax
import jax.numpy as jnp

from ..core import Inputs, QTensor


def effective(q: QTensor, axes: tuple[int, ...]) -> jax.Array:
    """The array W with x W equal to the product of activations x and q.

    Args:
        q: a parameter.
        axes: its contracted axes, from 0 up.
    """
    values = q.dequantize().astype(jnp.float32)
    inputs = q.inputs
    if inputs is None or not inputs.changes_weight:
        return values
    parts = inputs.multiplier, inputs.permutation, inputs.rotation
    stacked = max(x.ndim for x in jax.tree.leaves(parts)) - len(axes)
    places = tuple(a - q.ndim for a in axes)

    def undo(x: jax.Array, inputs: Inputs) -> jax.Array:
        if inputs.rotation is not None:
            x = inputs.rotation.undo(x, places)
        if inputs.multiplier is not None:
            last = jnp.moveaxis(x, places, range(-len(places), 0))
            factors = jnp.expand_dims(inputs.multiplier, range(x.ndim - len(places)))
            x = jnp.moveaxis(last * factors, range(-len(places), 0), places)
        if inputs.permutation is not None:
            x = jnp.take(x, jnp.argsort(inputs.permutation), places[0])
        return x

    bare = Inputs(multiplier=parts[0], permutation=parts[1], rotation=parts[2])
    for _ in range(stacked):
        undo = jax.vmap(undo)
    return undo(values, bare)
