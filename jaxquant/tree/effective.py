"""The array that a quantized parameter stands for where its activations are changed first."""

import jax
import jax.numpy as jnp

from ..core import Inputs, LowRank, QTensor


def effective(q: QTensor | LowRank, axes: tuple[int, ...] | None = None) -> jax.Array:
    """The array W for which x W is the product of activations x and q.

    That is the dequantized array, unless activations are permuted, multiplied or rotated first.

    Args:
        q: a parameter.
        axes: its contracted axes, from 0 up; None for those along which scales are shared.

    Raises:
        ValueError: axes is None, and scales do not say which axes are contracted.
    """
    inputs = q.inputs if isinstance(q, QTensor) else None
    if isinstance(q, LowRank) or inputs is None or not inputs.changes_weight:
        return q.dequantize()
    parts = Inputs(
        multiplier=inputs.multiplier, permutation=inputs.permutation, rotation=inputs.rotation
    )
    shape = jax.tree.leaves(parts)[0].shape
    axes = _shared(q) if axes is None else axes
    stacked = len(shape) - len(axes)
    known = min(axes, default=0) >= stacked >= 0
    if not known or shape != (*q.shape[:stacked], *(q.shape[a] for a in axes)):
        raise ValueError(
            f"{q!r} stands for another array than its dequantized values, because "
            f"inputs.{inputs.changing_field} of shape {shape} changes its activations, and its "
            f"scales do not say along which axes; got {axes}. Multiply with it instead."
        )
    places = tuple(a - q.ndim for a in axes)

    def undo(x: jax.Array, inputs: Inputs) -> jax.Array:
        if inputs.rotation is not None:
            x = inputs.rotation.undo(x, places)
        if inputs.multiplier is not None:
            last = range(-len(places), 0)
            factors = jnp.expand_dims(inputs.multiplier, range(x.ndim - len(places)))
            x = jnp.moveaxis(jnp.moveaxis(x, places, last) * factors, last, places)
        if inputs.permutation is not None:
            x = jnp.take(x, jnp.argsort(inputs.permutation), places[0])
        return x

    for _ in range(stacked):
        undo = jax.vmap(undo)
    wide = q.astype(jnp.float64 if q.dtype == jnp.float64 else jnp.float32)
    return undo(wide.dequantize(), parts).astype(q.dtype)


def _shared(q: QTensor) -> tuple[int, ...]:
    """The axes along which elements share a scale."""
    counts = [q.scale.shape[a] for a in q.stored_axes(range(q.ndim))]
    return tuple(a for a, (n, count) in enumerate(zip(q.shape, counts, strict=True)) if count < n)
