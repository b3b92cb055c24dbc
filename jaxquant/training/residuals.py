"""What the backward pass keeps of quantized operands, which loops over layers stack."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import bits_of, bits_to_float, bytes_to_pairs, float_to_bits
from ..jaxprs import names_along


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Residual:
    """A quantized operand that is kept for the backward pass. A pytree.

    XLA on CPU converts the whole stack of float8 or sub-byte arrays to wider elements, and back,
    whenever a step of a loop writes its part, so there the arrays are kept as bytes.

    Attributes:
        stored: the operand, on CPU with arrays of bytes.
        dtypes: of its arrays, static.
    """

    stored: Any
    dtypes: tuple[np.dtype, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, x: Any) -> "Residual":
        """The residual of a pytree of arrays."""
        dtypes = tuple(leaf.dtype for leaf in jax.tree.leaves(x))
        is_on_cpu = jax.default_backend() == "cpu"
        return cls(jax.tree.map(_to_bytes, x) if is_on_cpu else x, dtypes)

    def restore(self) -> Any:
        """The pytree, bit for bit."""
        leaves, structure = jax.tree.flatten(self.stored)
        return structure.unflatten(map(_from_bytes, leaves, self.dtypes))


def _to_bytes(x: jax.Array) -> jax.Array:
    x = float_to_bits(x)
    if bits_of(x.dtype) != 4 or not x.ndim or x.shape[-1] % (2 * _parts_of_last(x)):
        return x
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2), jnp.uint8)


def _parts_of_last(x: jax.Array) -> int:
    """Into how many parts explicit axes of a mesh divide the last axis."""
    shape = jax.typeof(x).sharding.mesh.shape
    return math.prod(shape[name] for name in names_along(x, x.ndim - 1))


def _from_bytes(x: jax.Array, dtype: np.dtype) -> jax.Array:
    if bits_of(x.dtype) == bits_of(dtype):
        return bits_to_float(x, dtype)
    return bytes_to_pairs(x, dtype)
