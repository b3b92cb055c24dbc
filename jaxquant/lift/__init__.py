"""Any JAX function on quantized arrays."""

from .find_uses import Use as Use
from .lift import lift as lift
from .uses import Uses as Uses
from .uses import uses as uses
