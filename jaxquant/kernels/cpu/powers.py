"""The native kernels for codes of power codebooks, as functions of JAX arrays."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...core import Format
from .library import call_kernel, unavailable


def encode_powers(
    x: jax.Array,
    format: Format,
    blocks: tuple[int, ...],
    seed: jax.Array | None = None,
    within: tuple[jax.Array, jax.Array] | None = None,
    starts: Sequence[Any] | None = None,
    instructions: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Quantizes blocks by their largest magnitudes, to codes of a power codebook.

    Args:
        x: float32.
        format: one that `why_unsupported_blocks` accepts for the shape of x.
        blocks: length of the blocks along each axis, which divides that of x.
        seed: uint32 (2,), random words for stochastic rounding; None rounds to nearest.
        within: codes and scales of an array of which x is a window; None if x is all of it.
        starts: int32 scalars, the place of the first element of x along each axis of that array, a
            multiple of the length of the blocks. The last one is even if codes have 4 bits.
        instructions: as for `quantize_rows`.

    Returns:
        codes: shape of the array, dtype of the format;
        scale: float32, one per block; both in place of `within` where XLA can overwrite it.

    Error: codes and scales are those of `quantize` under `jax.jit`, but where a value lies within
        1e-5 of a step of the border between two codes, it may get the other one.
    """
    codes = jax.ShapeDtypeStruct(x.shape, format.dtype)
    counts = [n // block for n, block in zip(x.shape, blocks, strict=True)]
    results: Any = codes, jax.ShapeDtypeStruct(counts, jnp.float32)
    whole, aliases = (jnp.zeros(0, jnp.uint8),) * 2, {}
    if within is not None:
        whole = within
        results = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in within)
        aliases = {3: 0, 4: 1}
    words = jnp.zeros(0, jnp.uint32) if seed is None else seed
    arrays = (x, _starts(starts, x.ndim), words, *whole)
    attributes = _codebook(format, blocks)
    return call_kernel(
        "encode_powers", results, instructions, *arrays, aliases=aliases, **attributes
    )


def decode_powers(
    codes: jax.Array,
    scale: jax.Array,
    format: Format,
    blocks: tuple[int, ...],
    window: tuple[int, ...] | None = None,
    starts: Sequence[Any] | None = None,
    after: jax.Array | None = None,
    instructions: str | None = None,
) -> jax.Array:
    """The values of codes and scales as `encode_powers` returns them, in float32.

    Args:
        codes, scale: as `encode_powers` returns them.
        format, blocks, starts: as for `encode_powers`.
        window: shape of the part to decode; None for all.
        after: array that XLA must have computed before; None for none.
        instructions: as for `quantize_rows`.

    Error: 6e-7 of the value.
    """
    after = jnp.zeros(0, jnp.float32) if after is None else after
    result = jax.ShapeDtypeStruct(codes.shape if window is None else window, jnp.float32)
    arrays = codes, scale, _starts(starts, codes.ndim), after
    return call_kernel("decode_powers", result, instructions, *arrays, **_codebook(format, blocks))


def empty(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, after: jax.Array) -> jax.Array:
    """An array that is not written, to be overwritten. XLA computes `after` before."""
    assert unavailable() is None, unavailable()
    result = jax.ShapeDtypeStruct(shape, dtype)
    return jax.ffi.ffi_call("jaxquant_empty", result, vmap_method="sequential")(after)


def why_unsupported_blocks(shape: tuple[int, ...], format: Format) -> str | None:
    """Why the kernels do not encode arrays of this shape in a format, or None."""
    if format.codebook is None or format.power is None:
        return f"{format} has no codebook of powers"
    if (format.qmin, format.qmax) != (format.codebook[0], format.codebook[-1]):
        return f"{format} does not use all of its codebook"
    if format.bits not in (4, 8):
        return f"{format} has codes of {format.bits} bits"
    if not shape or 0 in shape:
        return f"the array is empty or a scalar: {shape}"
    if format.bits == 4 and shape[-1] % 2:
        return f"rows of {shape[-1]} 4-bit codes do not begin with a byte"
    return None


def _codebook(format: Format, blocks: tuple[int, ...]) -> dict[str, Any]:
    """What a power codebook is computed from, and the lengths of the blocks."""
    assert format.codebook is not None, f"{format} does not have a codebook"
    assert format.power is not None, f"{format} is not of powers"
    count = len(format.codebook) // 2 if format.has_negative else len(format.codebook) - 1
    return {
        "power": np.int64(format.power),
        "count": np.int64(count),
        "has_negative": format.has_negative,
        "blocks": np.asarray(blocks, np.int64),
    }


def _starts(starts: Sequence[Any] | None, ndim: int) -> jax.Array:
    zeros = jnp.zeros(ndim, jnp.int32)
    return zeros if starts is None else jnp.stack([jnp.asarray(s, jnp.int32) for s in starts])
