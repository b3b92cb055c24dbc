"""Operands of products that are only explained, and what runs on the CPU of these tests."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant import (
    INT4,
    ArrayConfig,
    Inputs,
    QTensor,
    quantize,
)
from jaxquant.kernels import cpu

from ..ops.products import with_inputs

K, N = 384, 701


HAS_NATIVE = cpu.unavailable() is None


PLATFORMS = {"cpu": "cpu", "tpu": "tpu", "gpu": "cuda"}


def stored(shape=(K, N), order=(-1, -2), inputs=None, axis: Any = 0, **config) -> QTensor:
    """Only the shapes of weights that are stored column by column."""

    whole = jax.ShapeDtypeStruct(shape, jnp.float32)
    q = jax.eval_shape(lambda w: quantize(w, ArrayConfig(**config), axis).reorder(order), whole)
    return with_inputs(q, inputs and Inputs(inputs))


def floats(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


INT8_INPUTS = ArrayConfig()


W8A8: dict[str, Any] = {"inputs": INT8_INPUTS}


G128: dict[str, Any] = {"format": INT4, "group_size": 128}


BEST = next(iter(cpu.instruction_sets()), None)
IS_MEASURED = BEST == "AVX512-VNNI"
# Of floats and of codes; with other instructions, XLA multiplies many rows.
HAS_PANELS = BEST in ("AMX", "AVX512-VNNI")
HAS_INTEGER_PANELS = HAS_PANELS or BEST == "AVX2"


if_native = {True: "native"}.get(HAS_NATIVE, "blocks")


def if_panels(otherwise):
    return {True: "native"}.get(HAS_PANELS, otherwise)


def if_integer_panels(otherwise):
    return {True: "native"}.get(HAS_INTEGER_PANELS, otherwise)


SMALL = stored((64, 24))


X = floats(5, 64)


stacked = partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype))
