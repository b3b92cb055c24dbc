"""Quantized all-reduce: sums over devices that send codes instead of floats."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..core import ArrayConfig, bits_of, quantize
from .power_formats import GRADIENT_8
from .state_blocks import block_length, blocks_of

GRADIENT_8_BIT = ArrayConfig(format=GRADIENT_8, group_size=256)


def quantized_psum(
    x: Any,
    axis_name: str | Sequence[str],
    config: ArrayConfig = GRADIENT_8_BIT,
    *,
    key: jax.Array | None = None,
    error: Any = None,
) -> Any:
    """Quantized all-reduce in a `shard_map`: sends codes and one scale per block.

        sent   = quantize(x + error)           on each device; one part goes to each device
        total  = sum of dequantize(sent)       each device sums one part, in float32
        result = dequantize(quantize(total))   every device receives all parts
        error  = x + error - dequantize(sent)  plus total - result on the device that summed

    With error feedback, rounding errors are sent in the next step: over all devices, the sum of x
    and the previous errors equals the result plus the sum of the next errors, up to float32
    rounding.

    Args:
        x: pytree of float arrays, such as gradients; each device has its own values.
        axis_name: axis of the mesh to sum over, or several.
        config: format, scale dtype, and group size as the number of elements per block (None:
            128). Arrays smaller than a block are summed in float.
        key: random key for stochastic rounding, the same on all devices and different in each
            step; None rounds to nearest.
        error: None, or the error that was not sent yet, a tree like x: zeros at first, then the
            one that the last call returned. It differs between devices.

    Returns:
        The sums, in the tree, shapes and dtypes of x, equal on all devices; with an error, a pair
        of the sums and the next error. Divide by `jax.lax.axis_size(axis_name)` for means. A
        block that holds NaN or Inf on any device becomes NaN, in the sum and in the error.

    Raises:
        ValueError: an array is not floating, error is not a tree like x, or as for `quantize`.

    Error: without a key, half a step of each device's block plus half a step of the total's. A
        float32 all-reduce sends 8 bytes per element and device, this one 2 + 8/256 in 8 bits.
    Source: parts and two roundings: Dettmers 2016, arXiv:1511.04561; error feedback: Seide et al.
        2014, Karimireddy et al. 2019, arXiv:1901.09847, algorithm 2; for the second rounding:
        Tang et al. 2019 (DoubleSqueeze), arXiv:1905.05957, algorithm 1.

    Example:
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> total = jax.shard_map(
        ...     lambda x: jq.training.quantized_psum(x, "data"),
        ...     mesh=mesh, in_specs=P("data"), out_specs=P(),
        ... )
        >>> jax.jit(total)(jnp.ones(512)).shape
        (512,)
    """
    leaves, treedef = jax.tree.flatten(x)
    _check(leaves, config)
    errors = None if error is None else _like(error, leaves, treedef)
    block = block_length(config)
    given = leaves if errors is None else _add(leaves, errors)
    is_large = [leaf.size >= block for leaf in leaves]
    large = [leaf for leaf, is_in in zip(given, is_large, strict=True) if is_in]
    sums, rests = _sum_in_codes(large, axis_name, config, key) if large else ([], [])
    sums, rests = iter(sums), iter(rests)
    total, rest = [], []
    for leaf, now, is_in in zip(leaves, given, is_large, strict=True):
        summed = next(sums) if is_in else jax.lax.psum(now, axis_name)
        total.append(summed.astype(leaf.dtype))
        rest.append(next(rests) if is_in else jnp.zeros_like(now))
    total = jax.tree.unflatten(treedef, total)
    if errors is None:
        return total
    rest = [r.astype(e.dtype) for r, e in zip(rest, errors, strict=True)]
    return total, jax.tree.unflatten(treedef, rest)


def _check(leaves, config):
    if not isinstance(config, ArrayConfig):
        raise ValueError(
            f"config must be an ArrayConfig; got {config!r}. Pass the weights of a Scheme."
        )
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"x must hold floating-point arrays; got {leaf.dtype} of shape {leaf.shape}. Sum "
                "it with jax.lax.psum."
            )


def _like(error, leaves, treedef):
    """Leaves of the error, after its structure and shapes were compared with x."""
    found, structure = jax.tree.flatten(error)
    shapes = [leaf.shape for leaf in leaves]
    if structure != treedef or [e.shape for e in found] != shapes:
        raise ValueError(
            f"error must be a tree like x, {treedef} of shapes {shapes}; got {structure} of shapes "
            f"{[e.shape for e in found]}. Start with jax.tree.map(jnp.zeros_like, x)."
        )
    return found


def _add(leaves, errors):
    return [
        leaf.astype(jnp.float32) + e.astype(jnp.float32)
        for leaf, e in zip(leaves, errors, strict=True)
    ]


def _sum_in_codes(leaves, axis_name, config, key):
    """The sums of all leaves, and the next error of this device, both in float32."""
    devices, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    keys = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, here))
    block = block_length(config)
    blocks = blocks_of(config, block)
    mine = _join(leaves, devices, block)
    q = quantize(mine, blocks, -1, keys[0])
    received = _from_bytes(jax.lax.all_to_all(_to_bytes(q), axis_name, 0, 0), q)
    part = jnp.sum(received.dequantize(), 0, keepdims=True)
    q_part = quantize(part, blocks, -1, keys[1])
    total = jax.lax.all_gather(_to_bytes(q_part), axis_name, tiled=True, to="invarying")
    total = _from_bytes(total, q).dequantize()
    rest = mine - q.dequantize()
    # Only the device that rounded a part of the total knows its rounding error.
    rest = rest.at[here].add((part - q_part.dequantize())[0])
    return _separate(total, leaves, block), _separate(rest, leaves, block)


def _join(leaves, devices, block):
    """All leaves in an array of (devices, 1, length); each leaf starts a block."""
    rows = [leaf.astype(jnp.float32).reshape(-1) for leaf in leaves]
    rows = [jnp.pad(row, (0, -row.size % block)) for row in rows]
    row = jnp.concatenate(rows)
    return jnp.pad(row, (0, -row.size % (devices * block))).reshape(devices, 1, -1)


def _separate(joined, leaves, block):
    """Undoes `_join`."""
    row, start, found = joined.reshape(-1), 0, []
    for leaf in leaves:
        found.append(row[start : start + leaf.size].reshape(leaf.shape))
        start += leaf.size + -leaf.size % block
    return found


def _to_bytes(q):
    """All arrays of a QTensor of (rows, 1, length) as one array of bytes: a single message.

    XLA's CPU collectives do not support narrow floats and would send them as float16.
    """
    parts = [_bytes_of(x) for x in jax.tree.leaves(q)]
    return jnp.concatenate(parts, -1)


def _bytes_of(x):
    bits, rows = bits_of(x.dtype), x.shape[0]
    if bits < 8 and x.size // rows * bits % 8:
        # An odd number of 4-bit codes does not fill whole bytes.
        x, bits = x.astype(jnp.int8), 8
    if bits < 8:
        x = x.reshape(rows, -1, 8 // bits)
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(rows, -1)


def _from_bytes(message, like):
    """Undoes `_to_bytes`, for a QTensor whose arrays have the dtypes and lengths of `like`."""
    leaves, treedef = jax.tree.flatten(like)
    found, start = [], 0
    for x in leaves:
        length = _bytes_of(x).shape[-1]
        found.append(_array_of(message[:, start : start + length], x))
        start += length
    return jax.tree.unflatten(treedef, found)


def _array_of(part, like):
    bits, rows = bits_of(like.dtype), part.shape[0]
    shape = (rows, *like.shape[1:])
    if bits < 8 and part.shape[1:] == like.shape[2:]:
        return part.astype(like.dtype).reshape(shape)
    if bits > 8:
        part = part.reshape(rows, -1, bits // 8)
    return jax.lax.bitcast_convert_type(part, like.dtype).reshape(shape)
