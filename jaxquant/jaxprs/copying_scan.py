"""`scan`s that take slices of some arrays with a given function, in programs for one CPU.

The loop is traced by `jax.lax.scan`, and its equation replaced by one of another primitive with
the same parameters. That primitive has its own lowering; its derivatives are those of the `scan`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.extend.core.primitives import scan_p
from jax.interpreters import ad, batching, mlir

from .lowering import Function, is_for_one_cpu, transpose_of
from .params import READERS, count_before_slices, has_references, scan_counts, scan_options
from .walker import with_replaced


@dataclasses.dataclass(frozen=True)
class Copier:
    """How slices are copied.

    Attributes:
        copies: whether it copies the slices of an array, by its shape and dtype.
        take_slice: (array, index) -> the slice along the first axis.
    """

    copies: Callable[[Any], bool]
    take_slice: Callable[[jax.Array, jax.Array], jax.Array]


def with_copied_slices(loop: Function, copier: Copier, *args: Any) -> Any:
    """loop(*args), with the slices of its outermost `scan`s taken by the copier."""
    program, shapes = jax.make_jaxpr(loop, return_shape=True)(*args)
    out = _with_copier(program, copier)(*jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


def _with_copier(program: Any, copier: Copier) -> Function:
    def replace(eqn: Any) -> Any:
        slices = eqn.invars[count_before_slices(eqn) :]
        if has_references(eqn) or not any(copier.copies(v.aval) for v in slices):
            return eqn
        params = {**eqn.params, "copier": copier}
        return eqn.replace(primitive=_copying_scan, params=params)

    return with_replaced(program, replace)


def _plain(*args: Any, copier: Copier, **params: Any) -> list[Any]:
    return scan_p.bind(*args, **params)


def _by_copier(*args: Any, copier: Copier, **params: Any) -> list[Any]:
    """The same loop as `_plain`, with copied slices."""
    num_consts, num_carried = scan_counts(params)
    carries = slice(num_consts, num_consts + num_carried)
    consts, init, xs = args[: carries.start], args[carries], args[carries.stop :]
    step = jaxpr_as_fun(params["jaxpr"])

    def body(carry: Any, slices: Any) -> tuple[Any, Any]:
        index, parts = slices
        copied = {i: copier.take_slice(x, index) for i, x in enumerate(xs) if i not in parts}
        parts = parts | copied
        out = step(*consts, *carry, *(parts[i] for i in range(len(xs))))
        return out[: len(init)], out[len(init) :]

    others = {i: x for i, x in enumerate(xs) if not copier.copies(x)}
    indices = jnp.arange(params["length"], dtype=jnp.int32)
    carry, outputs = lax.scan(body, list(init), (indices, others), **scan_options(params))
    return [*carry, *outputs]


_copying_scan = Primitive("copying_scan")
_copying_scan.multiple_results = True


@_copying_scan.def_effectful_abstract_eval
def _(*avals: Any, copier: Copier, **params: Any) -> Any:
    return scan_p.abstract_eval(*avals, **params)


@_copying_scan.def_impl
def _(*args: Any, **params: Any) -> Any:
    return _compiled(**params)(*args)


@functools.lru_cache(maxsize=128)
def _compiled(**params: Any) -> Function:
    """The loop with these parameters, compiled, for calls outside of `jit`."""
    return jax.jit(functools.partial(_copying_scan.bind, **params))


def _jvp(primals: Any, tangents: Any, copier: Copier, **params: Any) -> Any:
    return ad.primitive_jvps[scan_p](primals, tangents, **params)


def _transpose(cotangents: Any, *args: Any, **params: Any) -> list[jax.Array | None]:
    return transpose_of(functools.partial(_plain, **params), cotangents, args)


def _batch(
    axis: Any, args: Any, dims: Any, copier: Copier, **params: Any
) -> tuple[list[Any], list[Any]]:
    out_dims = []

    def batched(*args):
        out, out_dims[:] = batching.fancy_primitive_batchers[scan_p](axis, args, dims, **params)
        return out

    return _with_copier(jax.make_jaxpr(batched)(*args), copier)(*args), out_dims


def _lower(context: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
    way = _by_copier if is_for_one_cpu(context) else _plain
    return mlir.lower_fun(way, multiple_results=True)(context, *args, **params)


READERS[_copying_scan] = READERS[scan_p]
ad.primitive_jvps[_copying_scan] = _jvp
ad.primitive_transposes[_copying_scan] = _transpose
batching.fancy_primitive_batchers[_copying_scan] = _batch
mlir.register_lowering(_copying_scan, _lower)
