"""Quantizes pytrees of parameters."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import (
    ArrayConfig,
    Axes,
    Format,
    Inputs,
    QTensor,
    TrainedArray,
    block_shape,
    normalize_axes,
    shared_axes,
)
from ..core import quantize as quantize_array
from ..jaxprs import is_tracer
from ..methods.internal import Notes, apply_chain, as_chain, needed, stack_axes
from ..ops import best_order
from .effective import effective
from .paths import is_quantized, leaves_with_paths
from .progress import Progress, progress_bar
from .rules import (
    Plan,
    Rule,
    Rules,
    as_rules,
    bits_per_weight,
    match_rules,
    shrinks,
    unused_rules,
)

# Problems of one kind are often those of every layer.
_MOST_PROBLEMS = 20


def quantize(
    params: Any,
    rules: Rules,
    *,
    method: Any = None,
    statistics: Mapping[str, Any] | None = None,
    progress: Progress | bool | None = None,
    platform: str | None = None,
) -> Any:
    """Quantizes the leaves of a tree that `rules` select.

    All leaves are checked first, and an error is raised before any leaf is quantized. Then
    `jaxquant.quantize` quantizes them one at a time, so that memory never holds more than the
    results and the intermediates of one leaf. Codes are stored in the fastest axis order for the
    platform.

    Args:
        params: any pytree of arrays: nested dicts, dataclasses, Flax or Equinox states.
        rules: a Scheme or ArrayConfig for matrices and embeddings (`default_rules`), a dict
            of pattern to scheme, a `Rule`, or a sequence of them. The first rule that matches
            a leaf decides; leaves that no rule matches are unchanged.
        method: how codes are chosen: a method such as `jq.methods.GPTQ()`, or a list of transforms
            and a method, such as `[jq.methods.SINQ(), jq.methods.Nearest()]`; None rounds to
            nearest. A rule with its own method overrides it.
        statistics: those that the methods need, from `jq.collect` with the same rules.
        progress: True for a progress bar on standard error, or a function of (leaves done,
            leaves in all, path), called after each leaf; None for neither.
        platform: "cpu", "gpu" or "tpu", where the result will be used; None for
            `jax.default_backend()`.

    Returns:
        The tree with a QTensor in place of each selected leaf, with `inputs` from its scheme.

    Warns:
        UserWarning: a method needed more damping than asked for, by path.

    Raises:
        ValueError: lists rules that match nothing, and selected leaves that cannot be quantized,
            the first 20 of all: a leaf is not floating-point, is already quantized, does not have
            the axis, has a length that the group size does not divide, contains NaN or Inf, or
            would not shrink. Or a method lacks statistics, or they do not fit the leaf.

    Error: as for `jaxquant.quantize`.

    Example:
        >>> q = jq.tree.quantize({"kernel": jnp.ones((64, 8)), "bias": jnp.ones(8)}, jq.W8A8)
        >>> q["kernel"].format, q["bias"].dtype
        (int8, dtype('float32'))
    """
    paths, leaves, chosen, treedef = select(params, rules)
    if method is not None:
        chain = as_chain(method)
        chosen = [plan and plan._replace(method=plan.method or chain) for plan in chosen]
    check_statistics(paths, chosen, statistics or {})
    total = sum(plan is not None for plan in chosen)
    platform = platform or jax.default_backend()
    result, done = [], 0
    with progress_bar(progress, total) as report:
        for path, leaf, plan in zip(paths, leaves, chosen, strict=True):
            if plan is not None:
                leaf = quantize_by_plan(path, leaf, plan, (statistics or {}).get(path), platform)
                done += 1
                report(done, total, path)
            result.append(leaf)
    return jax.tree.unflatten(treedef, result)


def select(
    params: Any, rules: Rules, check: Callable[[Any, Plan], str | None] | None = None
) -> tuple[list[str], list[Any], list[Plan | None], Any]:
    """Paths, leaves, the plan for each leaf or None, and the structure of a tree, all checked.

    Args:
        params, rules: as for `quantize`.
        check: (leaf, plan) -> why the leaf is unsupported, or None; None for
            `why_unsupported`.

    Raises:
        ValueError: as for `quantize`.
    """
    rules = as_rules(rules)
    paths, leaves, treedef = leaves_with_paths(params)
    chosen = [rule and rule.plan() for rule in match_rules(rules, paths, leaves)]
    _check(rules, paths, leaves, chosen, check or why_unsupported)
    return paths, leaves, chosen, treedef


def stored_order(leaf: Any, plan: Plan, platform: str | None = None) -> tuple[int, ...] | None:
    """The order of axes in which `quantize` stores a leaf, an array or a ShapeDtypeStruct."""
    # Kernels of convolutions, of which `contracted` is not given, keep their order.
    config = plan.scheme.weights
    if plan.contracted is None and len(shared_axes(plan.axis, leaf.ndim, config)) != 1:
        return None
    abstract = jax.eval_shape(partial(quantize_array, axis=plan.axis), leaf, config)
    return best_order(abstract, platform or jax.default_backend(), plan.contracted)


def dequantize(params: Any) -> Any:
    """Returns the tree with each QTensor, and its adapters, as the float array it stands for.

    Multipliers, permutations and rotations of activations are undone, so that products with the
    array are those of the QTensor, up to quantized activations.

    Raises:
        ValueError: the scales of a QTensor with a multiplier or a rotation do not say which axes
            are contracted: they are shared along others, too.

    Example:
        >>> q = jq.tree.quantize({"kernel": jnp.ones((64, 8))}, jq.W8A8)
        >>> jq.tree.dequantize(q)["kernel"].dtype
        dtype('float32')
    """
    return jax.tree.map(
        lambda x: effective(x) if is_quantized(x) else x, params, is_leaf=is_quantized
    )


def quantize_leaf(leaf: jax.Array, plan: Plan, platform: str | None = None) -> QTensor:
    """Quantizes one selected leaf without checking it."""
    return quantize_in_order(leaf, plan, stored_order(leaf, plan, platform))


def quantize_in_order(leaf: jax.Array, plan: Plan, order: tuple[int, ...] | None) -> QTensor:
    """`quantize_leaf` whose codes are stored in an order of axes."""
    scheme, axis = plan.scheme, plan.axis
    is_integer = jnp.issubdtype(scheme.weights.format.dtype, jnp.integer)
    quantized = _quantize_in_steps if is_integer else _quantize_at_once
    q = quantized(leaf, scheme.weights, axis, order)
    # Otherwise the next leaf would start before the memory of this one is free.
    q = jax.block_until_ready(q)
    return q if scheme.inputs is None else dataclasses.replace(q, inputs=Inputs(scheme.inputs))


def quantize_by_plan(
    path: str, leaf: jax.Array, plan: Plan, statistics: Any, platform: str | None = None
) -> QTensor:
    """Quantizes one selected leaf, by a method if its plan has one."""
    if plan.method is None or not leaf.size:
        return quantize_leaf(leaf, plan, platform)
    q, notes = apply_method(path, leaf, plan, statistics, platform)
    wanted = getattr(plan.method[-1], "damping", None)
    if wanted is not None and "damping" in notes and np.any(notes["damping"] > 1.5 * wanted):
        warnings.warn(
            f"{path}: the second moment of the activations is nearly singular; damping was raised "
            f"from {wanted} to {np.max(notes['damping']):.2g}. Collect more rows.",
            stacklevel=3,
        )
    return jax.block_until_ready(q)


def apply_method(
    path: str, leaf: jax.Array, plan: Plan, statistics: Any, platform: str | None = None
) -> tuple[QTensor, Notes]:
    """Quantizes one leaf by the method of its plan. May be traced for the form of the result."""
    scheme, axis, chain = plan.scheme, plan.axis, plan.method
    assert chain is not None, "the plan has a method"
    stacked = stack_axes(leaf.ndim, normalize_axes(axis, leaf.ndim))
    try:
        q, notes = apply_chain(chain, leaf, statistics, scheme.weights, axis, stacked)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    inputs = q.inputs or Inputs()
    if scheme.inputs is not None or inputs.changes_weight:
        q = dataclasses.replace(q, inputs=dataclasses.replace(inputs, config=scheme.inputs))
    return _reordered(q, stored_order(leaf, plan, platform)), notes


@partial(jax.jit, static_argnames="order")
def _reordered(q: QTensor, order: tuple[int, ...] | None) -> QTensor:
    return q.reorder(order)


def check_statistics(
    paths: list[str], chosen: list[Plan | None], statistics: Mapping[str, Any]
) -> None:
    """Checks that there are statistics for all methods that need them, and methods for statistics.

    Raises:
        ValueError: one that names the leaves whose methods have no statistics; or no leaf has a
            method.
    """
    if statistics and not any(plan is not None and plan.method for plan in chosen):
        raise ValueError(
            f"statistics must go with a method; got those of {', '.join(list(statistics)[:8])}, "
            "and no method. Pass method=, such as jq.methods.GPTQ(), or leave out statistics."
        )
    plans = zip(paths, chosen, strict=True)
    needing = [p for p, plan in plans if plan is not None and plan.method and needed(plan.method)]
    lacking = [path for path in needing if path not in statistics]
    if lacking:
        more = f" and {len(lacking) - 8} more" if len(lacking) > 8 else ""
        raise ValueError(
            f"statistics must have those of {', '.join(lacking[:8])}{more}; got "
            f"{', '.join(list(statistics)[:8]) or 'none'}. Pass statistics=jq.collect(apply, "
            "params, batches, rules, method), with the same rules, or --statistics."
        )


@partial(jax.jit, static_argnames=("axis", "order"))
def _quantize_at_once(
    x: jax.Array, config: ArrayConfig, axis: Axes, order: tuple[int, ...] | None
) -> QTensor:
    return quantize_array(x, config, axis).reorder(order)


def _quantize_in_steps(
    x: jax.Array, config: ArrayConfig, axis: Axes, order: tuple[int, ...] | None
) -> QTensor:
    """The same for integer codes, in separate programs.

    In a single program, XLA's CPU backend computes one code at a time if it writes them in
    another axis order or as 4 bits: 4096 x 4096 took 2.2 times as long for W8A8, and 1.4 times for
    W4A16. Floating-point codes take half as long in a single program.
    """
    q = quantize_array(x, _in_bytes(config), axis).reorder(order)
    return q if q.format == config.format else _with_format(q, config.format)


def _in_bytes(config: ArrayConfig) -> ArrayConfig:
    """The config with sub-byte codes stored in whole bytes. Codes and scales are the same."""
    format = config.format
    if format.bits >= 8:
        return config
    is_signed = jnp.issubdtype(format.dtype, jnp.signedinteger)
    format = dataclasses.replace(format, dtype="int8" if is_signed else "uint8")
    return dataclasses.replace(config, format=format)


@partial(jax.jit, static_argnames="format")
def _with_format(q: QTensor, format: Format) -> QTensor:
    zero_point = None if q.zero_point is None else q.zero_point.astype(format.dtype)
    codes = q.codes.astype(format.dtype)
    return dataclasses.replace(q, codes=codes, zero_point=zero_point, format=format)


def _check(
    rules: tuple[Rule, ...],
    paths: list[str],
    leaves: list[Any],
    chosen: list[Plan | None],
    check: Callable[..., str | None],
) -> None:
    """Raises one error that lists everything wrong."""
    problems = [f"rule {r.pattern!r} matches no leaf" for r in unused_rules(rules, paths, leaves)]
    if not problems and all(plan is None for plan in chosen):
        problems = ["the rules select no leaf"]
    if problems:
        known = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "") or "none"
        problems[-1] += f"; the paths are {known}"
    selected = [item for item in zip(paths, leaves, chosen, strict=True) if item[2] is not None]
    problems += [f"{path}: {why}" for path, *item in selected if (why := check(*item))]
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        shown = problems[:_MOST_PROBLEMS] + [f"and {more} more"] * (more > 0)
        lines = "\n  ".join(shown)
        count = "this problem" if len(problems) == 1 else f"these {len(problems)} problems"
        raise ValueError(f"Nothing was quantized; fix {count}:\n  {lines}")


def why_unsupported(leaf: Any, plan: Plan) -> str | None:
    """Why a leaf cannot be quantized as planned, or None."""
    if is_quantized(leaf):
        return (
            f"already quantized ({leaf!r}); dequantize it first (--requantize), or give it a rule "
            "with None (--rule PATH=none)"
        )
    if isinstance(leaf, TrainedArray):
        return f"already prepared for training ({leaf!r}); training.convert makes it a QTensor"
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return _not_floating(type(leaf).__name__, np.shape(leaf))
    why_not = why_unsupported_shape(leaf.shape, leaf.dtype, plan)
    if why_not is None and not is_tracer(leaf) and not is_finite(leaf):
        return f"holds NaN or Inf, shape {leaf.shape}; fix it, or give it a rule with None"
    return why_not


def _not_floating(what: Any, shape: tuple[int, ...]) -> str:
    return f"not a floating-point array, got {what} of shape {shape}; give it a rule with None"


def why_unsupported_shape(shape: tuple[int, ...], dtype: Any, plan: Plan) -> str | None:
    """Why an array of this shape and dtype cannot be quantized as planned, or None."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return _not_floating(dtype, shape)
    config, axis = plan.scheme.weights, plan.axis
    try:
        block_shape(shape, config, axis)
    except ValueError as error:
        return str(error)
    why_not = _why_not_contracted(plan, len(shape))
    if why_not is not None:
        return why_not
    if not shrinks(jax.ShapeDtypeStruct(shape, dtype), config, axis):
        return (
            f"takes {bits_per_weight(shape, config, axis):.1f} bits per weight, no fewer than "
            f"{dtype}, shape {shape}: few elements share a scale along axis={axis}; give it "
            "a rule with the contracted axes, or None"
        )
    return None


def _why_not_contracted(plan: Plan, ndim: int) -> str | None:
    """Why the contracted axes of a plan do not fit an array, or None."""
    if plan.contracted is None:
        return None
    try:
        contracted = normalize_axes(plan.contracted, ndim)
    except ValueError as error:
        return f"contracted: {error}"
    axes, is_blocks = (
        set(normalize_axes(plan.axis, ndim)),
        isinstance(plan.scheme.weights.group_size, tuple),
    )
    if axes <= set(contracted) or (is_blocks and axes & set(contracted)):
        return None
    return (
        f"contracted must name all axes along which elements share a scale; got contracted="
        f"{plan.contracted} for axis={plan.axis}"
    )


@jax.jit
def is_finite(x: jax.Array) -> jax.Array:
    """Whether an array has neither NaN nor Inf."""
    # Not tested with the maximum, because XLA's CPU backend drops NaN there.
    return jnp.all(jnp.isfinite(x))
