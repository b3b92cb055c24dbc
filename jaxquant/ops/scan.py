"""Loops over stacked layers, which slice codes of less than a byte as fast as other arrays.

XLA on CPU copies elements of less than a byte one at a time where it slices an array, and a loop
slices what it goes over: eight layers of 2048 x 2048 4-bit weights take 150 ms, and 2.3 ms where
machine code copies the bytes (`python -m benchmarks.loops` has the ratios).

The loop is traced by `jax.lax.scan`, and its operation replaced by one of our own, with the same
parameters. That has another lowering; whatever is derived from it is derived from JAX's.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.extend.core.primitives import scan_p
from jax.interpreters import ad, batching, mlir

from ..core import bits_of
from ..jaxprs import count_before_slices, is_for_one_cpu, is_narrow, transpose_of
from ..kernels import native


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[Any, Any]:
    """`jax.lax.scan`, fast over stacked QTensors of less than 8 bits on CPU too.

        for i in range(length):  init, y[i] = f(init, xs[i])

    There machine code copies each slice of 2-bit and 4-bit arrays, in bytes, where XLA would copy
    elements. Everything else is `jax.lax.scan`: other platforms, exported programs and those that
    XLA divides among devices, slices that are no whole number of bytes, whatever is
    differentiated, and installs without the machine code. Results are the same, bit for bit.

    Args:
        f: from the carry and a slice to the next carry and one output.
        init: the first carry, any pytree of arrays.
        xs: pytree of arrays and QTensors, to be sliced along their first axis; `f` gets QTensors
            of one layer. None for none.
        length: number of steps; None takes it from `xs`.
        reverse: whether the last slice comes first.
        unroll: steps to unroll into one, or whether to unroll all.

    Returns:
        The last carry, and the outputs stacked.

    Raises:
        TypeError, ValueError: as `jax.lax.scan` does.
    """

    def loop(init, xs):
        return lax.scan(f, init, xs, length, reverse, unroll)

    if native.unavailable() is not None or not any(map(_is_copied, jax.tree.leaves(xs))):
        return loop(init, xs)
    program, shapes = jax.make_jaxpr(loop, return_shape=True)(init, xs)
    out = _replaced(program)(*jax.tree.leaves((init, xs)))
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


def _is_copied(x):
    """Whether an array has elements of less than a byte, and slices of whole bytes."""
    if not is_narrow(x) or math.prod(x.shape) == 0:
        return False
    return math.prod(x.shape[1:]) * bits_of(x.dtype) % 8 == 0


def _replaced(program: ClosedJaxpr) -> Callable[..., list[jax.Array]]:
    """A traced program as a function, its loops over narrow arrays by our operation."""
    jaxpr = program.jaxpr
    eqns = [
        eqn.replace(primitive=_copying_scan) if _is_replaced(eqn) else eqn for eqn in jaxpr.eqns
    ]
    return jaxpr_as_fun(ClosedJaxpr(jaxpr.replace(eqns=eqns), program.consts))


def _is_replaced(eqn):
    is_pure = all(isinstance(v.aval, ShapedArray) for v in eqn.invars)  # has no `Ref`
    if eqn.primitive is not scan_p or not is_pure:
        return False
    return any(_is_copied(v.aval) for v in eqn.invars[count_before_slices(eqn.params) :])


def _plain(*args, **params):
    return scan_p.bind(*args, **params)


def _by_bytes(*args, **params):
    """The loop that `_plain` is, whose slices of narrow arrays machine code copies."""
    carries = slice(params["num_consts"], count_before_slices(params))
    consts, init, xs = args[: carries.start], args[carries], args[carries.stop :]
    step = jaxpr_as_fun(params["jaxpr"])

    def body(carry, slices):
        index, parts = slices
        copied = {i: native.take_slice(x, index) for i, x in enumerate(xs) if i not in parts}
        parts = parts | copied
        out = step(*consts, *carry, *(parts[i] for i in range(len(xs))))
        return out[: len(init)], out[len(init) :]

    others = {i: x for i, x in enumerate(xs) if not _is_copied(x)}
    indices = jnp.arange(params["length"], dtype=jnp.int32)
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, outputs = lax.scan(body, list(init), (indices, others), **options)
    return [*carry, *outputs]


_copying_scan = Primitive("copying_scan")
_copying_scan.multiple_results = True


@_copying_scan.def_effectful_abstract_eval
def _(*avals, **params):
    return scan_p.abstract_eval(*avals, **params)


@_copying_scan.def_impl
def _(*args, **params):
    return _compiled(**params)(*args)


@functools.lru_cache(maxsize=128)
def _compiled(**params):
    return jax.jit(functools.partial(_copying_scan.bind, **params))


def _jvp(primals, tangents, **params):
    return ad.primitive_jvps[scan_p](primals, tangents, **params)


def _transpose(cotangents, *args, **params):
    return transpose_of(functools.partial(_plain, **params), cotangents, args)


def _batch(axis, args, dims, **params):
    out_dims = []

    def batched(*args):
        out, out_dims[:] = batching.fancy_primitive_batchers[scan_p](axis, args, dims, **params)
        return out

    return _replaced(jax.make_jaxpr(batched)(*args))(*args), out_dims


def _lower(context, *args, **params):
    way = _by_bytes if is_for_one_cpu(context) else _plain
    return mlir.lower_fun(way, multiple_results=True)(context, *args, **params)


ad.primitive_jvps[_copying_scan] = _jvp
ad.primitive_transposes[_copying_scan] = _transpose
batching.fancy_primitive_batchers[_copying_scan] = _batch
mlir.register_lowering(_copying_scan, _lower)
