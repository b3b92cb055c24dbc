"""Any JAX function on quantized arrays."""

from .lift import lift as lift
