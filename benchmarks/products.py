"""Products of inputs by weights, as calls that do the same work: XLA's, ours, and alternatives.

A contender takes float weights and says what a call computes: inputs by these weights.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxquant as jq
from jaxquant.core import packed_bytes

SCHEMES = {
    "W8A8": jq.W8A8,
    "W8A16": jq.W8A16,
    "W4A16": jq.W4A16,
    "W4A8": jq.W4A8,
    "NF4A16": jq.NF4A16,
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
    """One way to compute inputs @ weights.

    Attributes:
        name: as printed.
        is_ours: whether it is this library's.
        prepare: (K, N) float32 weights -> what `run` reads.
        run: (inputs, prepared) -> result.
        dtype: the dtype that inputs are given in; None for that of the table.
        compile: what makes the call of `run`; `jax.jit` unless the contender is no JAX code.
        place: jax.Array -> the inputs as `run` takes them.
        copy: prepared -> the same in other memory.
        size: prepared -> bytes that a call reads of it.
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

    @property
    def is_jax(self) -> bool:
        """Whether `run` can be part of a larger JAX program."""
        return self.compile is jax.jit


def ours(name: str, scheme: jq.Scheme) -> Contender:
    """A scheme of this library, stored as `tree.quantize` stores it."""
    rule = [jq.Rule("*", scheme, axis=-2)]
    return Contender(
        name, True, lambda w: jq.tree.quantize({"kernel": w}, rule)["kernel"], jq.matmul
    )


def of_xla(dtype: str) -> Contender:
    """XLA's product of floats."""
    return Contender(f"XLA {dtype}", False, lambda w: w.astype(dtype), jnp.matmul, dtype)
