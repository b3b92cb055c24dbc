"""The row that supports all operands: dequantizes both and multiplies."""

import jax
import jax.numpy as jnp
from jax import lax

from ..dispatch import Implementation
from ..dot_spec import DotSpec, to_logical_order
from ..operands import Operand, as_array


def run(lhs: Operand, rhs: Operand, spec: DotSpec) -> jax.Array:
    """Dequantizes both operands as they are stored; XLA fuses that into the product if it can."""
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    out = lax.dot_general(
        as_array(lhs).astype(dtype),
        as_array(rhs).astype(dtype),
        (spec.contract, spec.batch),
        precision=spec.precision,
        preferred_element_type=spec.dtype,
        out_sharding=spec.out_sharding,
    )
    return to_logical_order(out, spec)


ROW = Implementation("dequantize", run, lambda lhs, rhs, spec: None, adds_offsets=True)
