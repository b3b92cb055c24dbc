"""How many bits a quantized parameter takes."""

import math

from ..core import QTensor


def stored_bits(q: QTensor) -> int:
    """Bits in device memory: codes, scales, zero points, multipliers and rotations.

    INT3 codes take 4 bits each there, as INT4 codes do.

    Example:
        >>> q = jq.quantize(jnp.ones((64, 8)), jq.W4A16.weights)
        >>> jq.allocation.stored_bits(q)  # 512 codes of 4 bits, and 8 scales of 32 bits.
        2304
    """
    return 8 * q.nbytes


def dense_bits(q: QTensor) -> int:
    """Bits in a file that packs codes without gaps: INT3 codes take 3 bits each.

    This is the size that a checkpoint or a kernel with dense 3-bit codes would have; arrays of
    jaxquant in memory are `stored_bits` long.

    Example:
        >>> config = jq.ArrayConfig(format=jq.FILE_FORMATS["int3"])
        >>> q = jq.quantize(jnp.ones((64, 8)), config)
        >>> jq.allocation.dense_bits(q), jq.allocation.stored_bits(q)
        (1792, 2304)
    """
    format = q.format
    if format.codebook is not None:
        levels = sum(format.qmin <= v <= format.qmax for v in format.codebook)
    elif format.rounds:
        levels = int(format.qmax - format.qmin) + 1
    else:
        levels = 2**format.bits
    saved = format.bits - min(math.ceil(math.log2(levels)), format.bits)
    return stored_bits(q) - saved * q.size
