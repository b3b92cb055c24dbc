"""How many bits a quantized parameter takes."""

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
    """Bits in a file of `jaxquant.save`, which packs codes without gaps: INT3 codes take 3 bits.

    Arrays in memory are `stored_bits` long.

    Example:
        >>> config = jq.ArrayConfig(format=jq.FILE_FORMATS["int3"])
        >>> q = jq.quantize(jnp.ones((64, 8)), config)
        >>> jq.allocation.dense_bits(q), jq.allocation.stored_bits(q)
        (1792, 2304)
    """
    return stored_bits(q) - (q.format.bits - q.format.dense_bits) * q.size
