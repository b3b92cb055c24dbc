"""A choice between ways to compute, by the TPU generation that a program is compiled for."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

Function = Callable[..., jax.Array]

# Generations by what JAX calls their devices.
_GENERATIONS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "7x",
}


def tpu_generation(device: Any) -> str | None:
    """Generation of a device ("v5e", "v6e", "7x"), or None if it is no TPU, or an unknown one."""
    return _GENERATIONS.get(getattr(device, "device_kind", None) or "")


def generation() -> str | None:
    """The generation of this process' TPUs; None for others, and without one."""
    return tpu_generation(jax.devices()[0])


def by_generation(branches: Mapping[str, Function], default: Function, *args: Any) -> jax.Array:
    """branches[generation](*args), by the TPU that the program is compiled for, or default(*args).

    Decided when the program is lowered, so right for TPUs that are described and not there. A
    program that `jax.export` writes can go anywhere: it takes the default.

    Args:
        branches: functions by generation.
        default: function for all others. All give an array of one shape and dtype.
        args: arrays.
    """
    return _choice.bind(*args, branches=tuple(branches.items()), default=default)


_choice = Primitive("by_generation")


@_choice.def_abstract_eval
def _(*avals, branches, default):
    out = jax.eval_shape(default, *avals)
    return avals[0].update(shape=out.shape, dtype=out.dtype, weak_type=False)


@_choice.def_impl
def _(*args, branches, default):
    run = dict(branches).get(tpu_generation(jax.devices()[0]) or "", default)
    return run(*args)


def _batch(args, axes, branches, default):
    branches = {name: jax.vmap(f, axes) for name, f in branches}
    return by_generation(branches, jax.vmap(default, axes), *args), 0


def _lower(ctx, *args, branches, default):
    module, generation = ctx.module_context, None
    # All devices of a backend are of one kind.
    if module.backend is not None and not module.lowering_parameters.for_export:
        generation = tpu_generation(module.backend.devices()[0])
    run = dict(branches).get(generation or "", default)
    return mlir.lower_fun(run, multiple_results=False)(ctx, *args)


batching.primitive_batchers[_choice] = _batch
mlir.register_lowering(_choice, _lower)
