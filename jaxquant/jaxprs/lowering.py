"""A choice between ways to compute, made when it is known where the program will run."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Function = Callable[..., Any]
Pick = Callable[[mlir.LoweringRuleContext | None], int]


def unless_exported(here: Function, elsewhere: Function, *args: jax.Array) -> Any:
    """here(*args), and elsewhere(*args) in what `jax.export` writes.

    Code that is registered in this process is not part of an exported program. Both give pytrees
    of arrays of the same structure, shapes and dtypes.
    """
    return _choose(here, elsewhere, _is_exported, args)


def on_one_cpu(here: Function, elsewhere: Function, *args: jax.Array) -> Any:
    """`unless_exported`; elsewhere(*args) also in programs that XLA divides among devices.

    It would gather on each device what lies in parts.
    """
    return _choose(here, elsewhere, _takes_no_kernel_of_cpu, args)


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


def is_for_one_cpu(context: mlir.LoweringRuleContext) -> bool:
    """Whether a program can hold machine code of this process, and will run on one CPU.

    XLA cannot divide machine code among devices: inside `shard_map` each one runs it.
    """
    return _platforms(context) == ("cpu",) and not _takes_no_kernel_of_cpu(context)


def _is_exported(context):
    return context.module_context.lowering_parameters.for_export


def _takes_no_kernel_of_cpu(context):
    return _is_exported(context) or _is_divided(context.module_context.axis_context)


def _takes_no_kernel_of_tpu(context):
    return _takes_no_kernel(context, "tpu", "'pallas' needs a TPU")


def _takes_no_kernel_of_gpu(context):
    is_divided = _takes_no_kernel(context, "cuda", "'triton' needs a GPU with CUDA")
    return is_divided or _is_exported(context)


def _takes_no_kernel(context, platform, need):
    platforms = _platforms(context)
    if platform not in platforms:
        raise ValueError(
            f"implementation={need}; got a program for {', '.join(platforms)}. "
            "Choose another one, or None."
        )
    return len(platforms) > 1 or _is_divided(context.module_context.axis_context)


def _platforms(context):
    return tuple(context.platforms or context.module_context.platforms)


def _is_divided(where):
    """Whether XLA divides the program, outside `shard_map` or along axes that it leaves alone."""
    if not hasattr(where, "mesh"):
        return where.num_devices > 1
    manual = where.manual_axes | set(where.mesh.manual_axes)
    return manual != frozenset(where.mesh.axis_names)


def _choose(here, elsewhere, goes_elsewhere, args):
    def pick(context):
        return context is not None and goes_elsewhere(context)

    return choose_when_lowered((here, elsewhere), pick, *args)


def transpose_of(
    function: Function, cotangents: Sequence[Any], args: Sequence[Any]
) -> list[jax.Array | None]:
    """Cotangents of the args in which a function is linear, as a rule for a primitive gives them.

    Args:
        function: from as many args to a list of results.
        cotangents: of its results, or JAX's zeros.
        args: values, or `UndefinedPrimal`s for those in which it is linear.
    """
    places = [i for i, x in enumerate(args) if ad.is_undefined_primal(x)]

    def linear(*values):
        whole = dict(enumerate(args)) | dict(zip(places, values, strict=True))
        return function(*(whole[i] for i in range(len(args))))

    back = jax.linear_transpose(linear, *(args[i].aval for i in places))
    by_place = dict(zip(places, back([*map(ad.instantiate_zeros, cotangents)]), strict=True))
    return [by_place.get(i) for i in range(len(args))]


def choose_when_lowered(ways: tuple[Function, ...], pick: Pick, *args: jax.Array) -> Any:
    """ways[pick(context)](*args), decided as the program is lowered.

    Args:
        ways: functions whose results have the same structure, shapes and dtypes.
        pick: from JAX's lowering context to the place of a way; True is 1. It gets None where
            nothing is lowered, because each operation runs by itself.
        args: arrays.
    """
    structure = jax.tree.structure(jax.eval_shape(ways[-1], *args))
    leaves = _choice.bind(*args, ways=tuple(_flat(way) for way in ways), pick=pick)
    return jax.tree.unflatten(structure, leaves)


def _flat(function):
    return lambda *args: jax.tree.leaves(function(*args))


_choice = Primitive("choice")
_choice.multiple_results = True


@_choice.def_abstract_eval
def _(*avals, ways, pick):
    return [out.update(weak_type=False) for out in jax.make_jaxpr(ways[-1])(*avals).out_avals]


@_choice.def_impl
def _(*args, ways, pick):
    return ways[pick(None)](*args)


def _batch(args, axes, ways, pick):
    out = _choice.bind(*args, ways=tuple(jax.vmap(way, axes) for way in ways), pick=pick)
    return out, [0] * len(out)


def _transpose(cotangents, *args, ways, pick):
    """By the last way, because kernels have no transpose."""
    return transpose_of(ways[-1], cotangents, args)


def _lower(context, *args, ways, pick):
    return mlir.lower_fun(ways[pick(context)], multiple_results=True)(context, *args)


batching.primitive_batchers[_choice] = _batch
ad.primitive_transposes[_choice] = _transpose
mlir.register_lowering(_choice, _lower)
