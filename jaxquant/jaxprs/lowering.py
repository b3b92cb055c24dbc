"""Selection between computations at lowering, when the target of a program is known."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .each_part import has_parts
from .sharding import vary_alike

Function = Callable[..., Any]
Select = Callable[[mlir.LoweringRuleContext | None], int]


def unless_exported(here: Function, elsewhere: Function, *args: Any) -> Any:
    """here(*args), and elsewhere(*args) in programs that `jax.export` writes.

    Native code that this process registered is not part of an exported program. Both functions
    return pytrees of arrays of the same structure, shapes and dtypes.
    """
    return _switch(here, elsewhere, _is_exported, args)


def on_one_cpu(here: Function, elsewhere: Function, *args: Any) -> Any:
    """`unless_exported`; elsewhere(*args) also in programs that XLA partitions.

    XLA cannot partition native code: it would gather sharded operands on every device.
    """
    return _switch(here, elsewhere, _excludes_cpu_kernels, args)


def on_each_cpu(here: Function, parts: Function, elsewhere: Function, *args: Any) -> Any:
    """`on_one_cpu`; parts(*args) in programs that XLA partitions, outside of `shard_map`.

    For functions made of `on_each_part`.
    """

    def select(context: mlir.LoweringRuleContext | None) -> int:
        if context is None or not _excludes_cpu_kernels(context):
            return 0
        return 1 if not _is_exported(context) and has_parts(context) else 2

    return lowering_switch((here, parts, elsewhere), select, *args)


def unless_partitioned(here: Function, elsewhere: Function, *args: Any) -> Any:
    """here(*args), and elsewhere(*args) in programs that XLA partitions.

    For loops over slices of an array: XLA would gather a sharded one on every device. Both
    functions are as for `unless_exported`.
    """
    return _switch(here, elsewhere, _is_partitioned_program, args)


def on_one_tpu(here: Function, elsewhere: Function, *args: Any) -> Any:
    """here(*args), and elsewhere(*args) in programs that XLA partitions.

    XLA cannot partition Pallas kernels; inside `shard_map` each device runs one. They are part of
    an exported program, unless it is for several platforms. Both functions are as for
    `unless_exported`.

    Raises:
        ValueError: when the program is lowered, if it is not for TPUs.
    """
    return _switch(here, elsewhere, _excludes_tpu_kernels, args)


def on_one_gpu(here: Function, elsewhere: Function, *args: Any) -> Any:
    """`on_one_tpu` for GPUs with CUDA; elsewhere(*args) also in programs that `jax.export` writes.

    `jax.export` rejects Triton kernels because their serialized form may change between versions.

    Raises:
        ValueError: when the program is lowered, if it is not for CUDA.
    """
    return _switch(here, elsewhere, _excludes_gpu_kernels, args)


def is_for_one_cpu(context: mlir.LoweringRuleContext) -> bool:
    """Whether a program can hold native code of this process, and runs on one CPU.

    XLA cannot partition native code; inside `shard_map` each device runs it.
    """
    return _platforms(context) == ("cpu",) and not _excludes_cpu_kernels(context)


def _is_exported(context: mlir.LoweringRuleContext) -> bool:
    return context.module_context.lowering_parameters.for_export


def _is_partitioned_program(context: mlir.LoweringRuleContext) -> bool:
    return _is_partitioned(context.module_context.axis_context)


def _excludes_cpu_kernels(context: mlir.LoweringRuleContext) -> bool:
    return _is_exported(context) or _is_partitioned_program(context)


def _excludes_tpu_kernels(context: mlir.LoweringRuleContext) -> bool:
    return _excludes_kernels(context, "tpu", "'pallas' needs a TPU")


def _excludes_gpu_kernels(context: mlir.LoweringRuleContext) -> bool:
    is_excluded = _excludes_kernels(context, "cuda", "'triton' needs a GPU with CUDA")
    return is_excluded or _is_exported(context)


def _excludes_kernels(context: mlir.LoweringRuleContext, platform: str, need: str) -> bool:
    platforms = _platforms(context)
    if platform not in platforms:
        raise ValueError(
            f"implementation={need}; got a program for {', '.join(platforms)}. "
            "Choose another one, or None."
        )
    return len(platforms) > 1 or _is_partitioned_program(context)


def _platforms(context: mlir.LoweringRuleContext) -> tuple[str, ...]:
    return tuple(context.platforms or context.module_context.platforms)


def _is_partitioned(axes: Any) -> bool:
    """Whether XLA partitions the program: outside `shard_map`, or along axes not manual in it."""
    if not hasattr(axes, "mesh"):
        return axes.num_devices > 1
    manual = axes.manual_axes | set(axes.mesh.manual_axes)
    return manual != frozenset(axes.mesh.axis_names)


def _switch(
    here: Function,
    elsewhere: Function,
    goes_elsewhere: Callable[[mlir.LoweringRuleContext], bool],
    args: Sequence[Any],
) -> Any:
    def select(context: mlir.LoweringRuleContext | None) -> bool:
        return context is not None and goes_elsewhere(context)

    return lowering_switch((here, elsewhere), select, *args)


def transpose_of(
    function: Function, cotangents: Sequence[Any], args: Sequence[Any]
) -> list[jax.Array | None]:
    """The transpose of a function, as a primitive's transpose rule returns it.

    Args:
        function: from as many args to a list of results.
        cotangents: of its results, or JAX's symbolic zeros.
        args: values, or `UndefinedPrimal`s for the args in which it is linear.

    Returns:
        Cotangents of the args in which it is linear, None for the others.
    """
    places = [i for i, x in enumerate(args) if ad.is_undefined_primal(x)]

    def linear(*values):
        whole = dict(enumerate(args)) | dict(zip(places, values, strict=True))
        return function(*(whole[i] for i in range(len(args))))

    back = jax.linear_transpose(linear, *(args[i].aval for i in places))
    by_place = dict(zip(places, back([*map(ad.instantiate_zeros, cotangents)]), strict=True))
    return [by_place.get(i) for i in range(len(args))]


def lowering_switch(branches: tuple[Function, ...], select: Select, *args: Any) -> Any:
    """branches[select(context)](*args), selected when the program is lowered.

    Args:
        branches: functions whose results have the same structure, shapes and dtypes.
        select: from JAX's lowering context to the index of a branch; True is 1. It gets None for
            eager operations, which are not lowered.
        args: pytrees of arrays. Inside `shard_map`, all vary along the same mesh axes.
    """
    leaves, given = jax.tree.flatten(args)
    structure = jax.tree.structure(jax.eval_shape(branches[-1], *args))
    flat = tuple(_flat(branch, given) for branch in branches)
    out = _switch_p.bind(*vary_alike(leaves), branches=flat, select=select)
    return jax.tree.unflatten(structure, out)


def _flat(function: Function, given: Any) -> Function:
    return lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(given, leaves)))


_switch_p = Primitive("lowering_switch")
_switch_p.multiple_results = True


@_switch_p.def_abstract_eval
def _(*avals: Any, branches: tuple[Function, ...], select: Select) -> list[Any]:
    return [out.update(weak_type=False) for out in jax.make_jaxpr(branches[-1])(*avals).out_avals]


@_switch_p.def_impl
def _(*args: Any, branches: tuple[Function, ...], select: Select) -> list[Any]:
    return branches[select(None)](*args)


def _batch(
    args: Any, axes: Any, branches: tuple[Function, ...], select: Select
) -> tuple[list[Any], list[int]]:
    batched = tuple(jax.vmap(branch, axes) for branch in branches)
    out = _switch_p.bind(*args, branches=batched, select=select)
    return out, [0] * len(out)


def _transpose(
    cotangents: Any, *args: Any, branches: tuple[Function, ...], select: Select
) -> list[jax.Array | None]:
    """The transpose of the last branch, because kernels do not have one."""
    return transpose_of(branches[-1], cotangents, args)


def _lower(
    context: mlir.LoweringRuleContext, *args: Any, branches: tuple[Function, ...], select: Select
) -> Any:
    branch = branches[select(context)]
    return mlir.lower_fun(branch, multiple_results=True)(context, *args)


batching.primitive_batchers[_switch_p] = _batch
ad.primitive_transposes[_switch_p] = _transpose
mlir.register_lowering(_switch_p, _lower)
