"""Mixtures of experts for the layers of `llama`, on one device or divided among several."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core import QTensor, specs
from ..ops import einsum, ragged_dot


def mixture(
    x: jax.Array,
    weights: Any,
    count: int,
    axis: str | None = None,
    layer: jax.Array | int | None = None,
) -> jax.Array:
    """Each token by the experts that a router chooses for it.

        out = sum over experts e of p_e * down_e(silu(gate_e(x)) * up_e(x)),

    of the `count` most probable experts, with their probabilities p scaled to add up to 1.

    Args:
        x: (B, T, D).
        weights: "router", a dict with a kernel (E, D), and "experts", a dict of "gate" and "up",
            (E, D, H), and "down", (E, H, D); floats or quantized along their second axis.
        count: experts per token.
        axis: the mesh axis among which experts are divided, each device having as many; None if
            each has all. Needs a mesh (`jax.set_mesh`).
        layer: index of a layer whose experts are stacked with those of others, along a first axis;
            None if they are not.

    Returns:
        (B, T, D).

    Source: Shazeer et al. 2017, arXiv:1701.06538; with the gates of Jiang et al. 2024,
    arXiv:2401.04088.
    """
    rows = x.reshape(-1, x.shape[-1])
    scores = einsum("td,ed->te", rows, weights["router"]["kernel"]).astype(jnp.float32)
    found, experts = lax.top_k(jax.nn.softmax(scores), count)
    found = found / jnp.sum(found, -1, keepdims=True)
    parts = weights["experts"]
    if axis is None:
        return _experts(rows, found, experts, parts, layer, 0).reshape(x.shape)

    def local(
        rows: jax.Array, found: jax.Array, experts: jax.Array, parts: Any, layer: Any
    ) -> jax.Array:
        first = lax.axis_index(axis) * parts["gate"].shape[-3]
        return lax.psum(_experts(rows, found, experts, parts, layer, first), axis)

    mesh = jax.sharding.get_abstract_mesh()
    spec = jax.P(axis) if layer is None else jax.P(None, axis)
    divided = {
        name: specs(w, spec, mesh) if isinstance(w, QTensor) else spec for name, w in parts.items()
    }
    given = (rows, found, experts, parts, None if layer is None else jnp.asarray(layer))
    out = jax.shard_map(
        local,
        in_specs=(jax.P(), jax.P(), jax.P(), divided, jax.P()),
        out_specs=jax.P(),
        axis_names={axis},
    )(*given)
    return out.reshape(x.shape)


def _experts(
    rows: jax.Array,
    found: jax.Array,
    experts: jax.Array,
    parts: Any,
    layer: jax.Array | int | None,
    first: jax.Array | int,
) -> jax.Array:
    """What the experts from number `first` on, as many as `parts` has, add to each row."""
    here = parts["gate"].shape[-3]
    number = experts.reshape(-1) - first
    number = jnp.where((number >= 0) & (number < here), number, here)
    order = jnp.argsort(number)
    sizes = jnp.bincount(number, length=here + 1)[:here]
    token = order // experts.shape[1]
    x = rows[token]
    gate, up = (ragged_dot(x, parts[name], sizes, layer=layer) for name in ("gate", "up"))
    out = ragged_dot(jax.nn.silu(gate) * up, parts["down"], sizes, layer=layer)
    out = out * found.reshape(-1, 1)[order].astype(out.dtype)
    return jnp.zeros_like(rows).at[token].add(out)
