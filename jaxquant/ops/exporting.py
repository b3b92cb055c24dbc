"""A choice between two ways to compute, by whether the program leaves this process."""

from collections.abc import Callable

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

Function = Callable[..., jax.Array]


def unless_exported(here: Function, elsewhere: Function, *args: jax.Array) -> jax.Array:
    """here(*args), and elsewhere(*args) in what `jax.export` writes.

    Code that is registered in this process is not part of an exported program. Both give an array
    of one shape and dtype.
    """
    return _choice.bind(*args, here=here, elsewhere=elsewhere)


_choice = Primitive("unless_exported")


@_choice.def_abstract_eval
def _(*avals, here, elsewhere):
    out = jax.eval_shape(elsewhere, *avals)
    return avals[0].update(shape=out.shape, dtype=out.dtype, weak_type=False)


@_choice.def_impl
def _(*args, here, elsewhere):
    return here(*args)


def _batch(args, axes, here, elsewhere):
    here, elsewhere = (jax.vmap(f, axes) for f in (here, elsewhere))
    return _choice.bind(*args, here=here, elsewhere=elsewhere), 0


def _lower(ctx, *args, here, elsewhere):
    is_exported = ctx.module_context.lowering_parameters.for_export
    lower = mlir.lower_fun(elsewhere if is_exported else here, multiple_results=False)
    return lower(ctx, *args)


batching.primitive_batchers[_choice] = _batch
mlir.register_lowering(_choice, _lower)
