"""The derivative of an operation on quantized operands: that of the operation on their values.

Rounding has derivative zero almost everywhere; here it counts as the identity (the
straight-through estimator, Bengio et al. 2013, arXiv:1308.3432). So a float operand gets the
gradient of the float product, except where a calibrated scale of `inputs` clips it. That scale
gets the gradient of a step (LSQ, Esser et al. 2020, arXiv:1902.08153, eq. 3), a floating-point zero
point beside it that of LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576, eq. 5), and scales of 16 bits
or more get theirs. Codes get none. A QTensor with `values` passes all of its gradient to these.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..core import bits_of


def tangent_of(
    reference: Callable[..., jax.Array], primals: Any, tangents: Any, out: jax.Array
) -> jax.Array:
    """The tangent of reference(*primals), which has the shape and dtype of `out`.

    Args:
        reference: the operation on dequantized operands.
        primals: pytrees of arrays.
        tangents: the same structure, with JAX's symbolic zeros.
        out: the result, of the computation that ran.
    """
    leaves, treedef = jax.tree.flatten(primals)
    along = jax.tree.leaves(tangents)
    # Products with zero tangents would otherwise be computed in full.
    active = [i for i, t in enumerate(along) if _carries_gradient(t)]
    if not active:
        return jnp.zeros_like(out)

    def of_active(*values):
        changed = dict(enumerate(leaves)) | dict(zip(active, values, strict=True))
        return reference(*jax.tree.unflatten(treedef, changed.values()))

    at = [leaves[i] for i in active], [along[i] for i in active]
    return jax.jvp(of_active, *at)[1]


def _carries_gradient(tangent: Any) -> bool:
    """Whether it is that of values or scales, and not zero or that of codes."""
    if isinstance(tangent, jax.custom_derivatives.SymbolicZero):
        return False
    return jnp.issubdtype(tangent.dtype, jnp.floating) and bits_of(tangent.dtype) >= 16
