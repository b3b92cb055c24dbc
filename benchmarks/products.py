"""Contenders: ways to multiply activations by weights. XLA's, ours, and the type for all others.

A contender prepares float weights once; each call then multiplies activations by them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxquant as jq
from jaxquant.core import packed_bytes


def _in_groups(scheme: jq.Scheme) -> jq.Scheme:
    """The scheme in groups of 32."""
    return dataclasses.replace(scheme, weights=dataclasses.replace(scheme.weights, group_size=32))


SCHEMES = {
    "W8A8": jq.W8A8,
    "W8A16": jq.W8A16,
    "W4A16": jq.W4A16,
    "W4A8": jq.W4A8,
    "NF4A16": jq.NF4A16,
    # The groups of GGUF files, which also divide the widths of small models.
    "W4A8 g32": _in_groups(jq.W4A8),
    "W4A16 g32": _in_groups(jq.W4A16),
    "W8A8 g32": _in_groups(jq.W8A8),
}


def copy_arrays(weights: Any) -> Any:
    """The same weights in other memory."""
    return jax.tree.map(jnp.copy, weights)


def bytes_of(weights: Any) -> int:
    """Bytes in device memory."""
    return sum(packed_bytes(x) for x in jax.tree.leaves(weights))


def _as_it_is(x):
    return x


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute activations @ weights.

    Attributes:
        name: as printed.
        is_ours: whether it belongs to this library.
        prepare: (K, N) float32 weights -> what `run` reads.
        run: (activations, prepared) -> result.
        dtype: dtype of the activations; None for that of the table.
        compile: turns `run` into the call; `jax.jit` unless the contender is not JAX code.
        place: jax.Array -> the activations as `run` expects them.
        copy: prepared -> a copy in other memory.
        size: prepared -> bytes of it that a call reads.
        arithmetic: narrowest kind of both operands that the scheme allows: "bf16",
            "int8", "fp8".
    """

    name: str
    is_ours: bool
    prepare: Callable[[jax.Array], Any]
    run: Callable[[Any, Any], Any]
    dtype: str | None = None
    compile: Callable[[Callable[..., Any]], Callable[..., Any]] = jax.jit
    place: Callable[[jax.Array], Any] = _as_it_is
    copy: Callable[[Any], Any] = copy_arrays
    size: Callable[[Any], int] = bytes_of
    arithmetic: str = "bf16"

    @property
    def is_jax(self) -> bool:
        """Whether `run` can be part of a larger JAX program."""
        return self.compile is jax.jit


def ours(name: str, scheme: jq.Scheme, platform: str | None = None) -> Contender:
    """A scheme of this library, stored as `tree.quantize` stores it for a platform."""
    rule = [jq.Rule("*", scheme, axis=-2)]

    def prepare(w):
        return jq.tree.quantize({"kernel": w}, rule, platform=platform)["kernel"]

    return Contender(name, True, prepare, jq.matmul, arithmetic=_arithmetic(scheme))


def _arithmetic(scheme):
    if scheme.inputs is None:
        return "bf16"
    formats = (scheme.weights.format, scheme.inputs.format)
    return "int8" if all(f.rounds for f in formats) else "fp8"


def threefold(contender: Contender) -> Contender:
    """The same activations by three matrices, like those of queries, keys and values."""
    return dataclasses.replace(
        contender,
        name=f"{contender.name} x 3",
        prepare=lambda w: tuple(contender.prepare(w) for _ in range(3)),
        run=lambda x, weights: tuple(contender.run(x, w) for w in weights),
    )


def once_quantized(contender: Contender, inputs: jq.ArrayConfig) -> Contender:
    """A `threefold` contender that quantizes its activations once, up front."""

    def run(x, weights):
        return contender.run(jq.quantize(x, inputs, axis=-1), weights)

    return dataclasses.replace(contender, name=f"{contender.name}, quantized once", run=run)


def of_xla(dtype: str) -> Contender:
    """XLA's matrix multiplication in a floating-point dtype."""
    return Contender(f"XLA {dtype}", False, lambda w: w.astype(dtype), jnp.matmul, dtype)
