"""A choice between two ways to compute, made when it is known where the program will run."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

Function = Callable[..., Any]


def unless_exported(here: Function, elsewhere: Function, *args: jax.Array) -> Any:
    """here(*args), and elsewhere(*args) in what `jax.export` writes.

    Code that is registered in this process is not part of an exported program. Both give pytrees
    of arrays of the same structure, shapes and dtypes.
    """
    return _choose(here, elsewhere, _is_exported, args)


def on_one_tpu(here: Function, elsewhere: Function, *args: jax.Array) -> Any:
    """here(*args), and elsewhere(*args) in programs that XLA divides among devices.

    Pallas' kernels are part of an exported program, unless it is for several platforms, and XLA
    cannot divide them: inside `shard_map` each device runs one. Both functions are as for
    `unless_exported`.

    Raises:
        ValueError: as the program is lowered, if it is not for TPUs.
    """
    return _choose(here, elsewhere, _takes_no_kernel_of_tpu, args)


def on_one_gpu(here: Function, elsewhere: Function, *args: jax.Array) -> Any:
    """`on_one_tpu` for GPUs with CUDA; elsewhere(*args) also in what `jax.export` writes.

    It refuses Triton's kernels, whose form may change between versions.

    Raises:
        ValueError: as the program is lowered, if it is not for CUDA.
    """
    return _choose(here, elsewhere, _takes_no_kernel_of_gpu, args)


def _is_exported(context):
    return context.module_context.lowering_parameters.for_export


def _takes_no_kernel_of_tpu(context):
    return _takes_no_kernel(context, "tpu", "'pallas' needs a TPU")


def _takes_no_kernel_of_gpu(context):
    is_divided = _takes_no_kernel(context, "cuda", "'triton' needs a GPU with CUDA")
    return is_divided or _is_exported(context)


def _takes_no_kernel(context, platform, need):
    platforms = tuple(context.platforms or context.module_context.platforms)
    if platform not in platforms:
        raise ValueError(
            f"implementation={need}; got a program for {', '.join(platforms)}. "
            "Choose another one, or None."
        )
    return len(platforms) > 1 or _is_divided(context.module_context.axis_context)


def _is_divided(where):
    """Whether XLA divides the program, outside `shard_map` or along axes that it leaves alone."""
    if not hasattr(where, "mesh"):
        return where.num_devices > 1
    manual = where.manual_axes | set(where.mesh.manual_axes)
    return manual != frozenset(where.mesh.axis_names)


def _choose(here, elsewhere, goes_elsewhere, args):
    found = jax.tree.structure(jax.eval_shape(elsewhere, *args))
    ways = {"here": _flat(here), "elsewhere": _flat(elsewhere)}
    leaves = _choice.bind(*args, **ways, goes_elsewhere=goes_elsewhere)
    return jax.tree.unflatten(found, leaves)


def _flat(function):
    return lambda *args: jax.tree.leaves(function(*args))


_choice = Primitive("choice")
_choice.multiple_results = True


@_choice.def_abstract_eval
def _(*avals, here, elsewhere, goes_elsewhere):
    return [
        avals[0].update(shape=out.shape, dtype=out.dtype, weak_type=False)
        for out in jax.eval_shape(elsewhere, *avals)
    ]


@_choice.def_impl
def _(*args, here, elsewhere, goes_elsewhere):
    return here(*args)


def _batch(args, axes, here, elsewhere, goes_elsewhere):
    here, elsewhere = (jax.vmap(f, axes) for f in (here, elsewhere))
    out = _choice.bind(*args, here=here, elsewhere=elsewhere, goes_elsewhere=goes_elsewhere)
    return out, [0] * len(out)


def _lower(context, *args, here, elsewhere, goes_elsewhere):
    chosen = elsewhere if goes_elsewhere(context) else here
    return mlir.lower_fun(chosen, multiple_results=True)(context, *args)


batching.primitive_batchers[_choice] = _batch
mlir.register_lowering(_choice, _lower)
