"""Applies a chain of methods to a parameter of any layout."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import ArrayConfig, Axes, Inputs, QTensor
from .layout import Layout, matrix_config
from .method import Statistics, is_method, is_transform, with_notes
from .nearest import Nearest
from .rotation import check_order, rotated
from .statistics import Statistic

Chain = tuple[Any, ...]


def as_chain(method: Any) -> Chain:
    """A method, or a list of transforms and a method, as a tuple that ends with a method.

    Raises:
        ValueError: an item is neither a method nor a transform, or a method is not the last one.
    """
    items = tuple(method) if isinstance(method, list | tuple) else (method,)
    for i, item in enumerate(items):
        is_last = i == len(items) - 1
        if not (is_transform(item) or is_method(item)):
            raise ValueError(
                "method must be a method such as jq.methods.GPTQ(), or a list of transforms and a "
                f"method; got {item!r}."
            )
        if not is_last and not is_transform(item):
            raise ValueError(
                f"Only the last method of a list chooses codes; got {item!r} before "
                f"{items[i + 1]!r}. Put transforms, such as AWQ or SINQ, before it."
            )
    if not items or is_transform(items[-1]):
        items = (*items, Nearest())
    check_order(items)
    return items


def needed(chain: Chain) -> tuple[type[Statistic], ...]:
    """The statistics that a chain needs."""
    return tuple(dict.fromkeys(kind for item in chain for kind in item.statistics))


def find(statistics: Mapping[type[Statistic], Any], kind: type[Statistic]) -> Statistic | None:
    """A statistic, possibly as a part of a larger one; None if it is not among them."""
    if kind in statistics:
        return statistics[kind]
    parts = {type(part): part for larger in statistics.values() for part in larger.parts()}
    return find(parts, kind) if parts else None


def apply_chain(
    chain: Chain,
    weight: jax.Array,
    statistics: Mapping[type[Statistic], Any] | None,
    config: ArrayConfig,
    axis: Axes,
    stacked: int,
) -> tuple[QTensor, dict[str, jax.Array]]:
    """Quantizes a parameter by a chain of methods.

    Args:
        chain: from `as_chain`.
        weight: the parameter.
        statistics: those that the chain needs, by class; None if it needs none.
        config, axis: as for `jaxquant.quantize`; the axes are those that are contracted.
        stacked: leading axes that are stacked layers, if the statistics do not say.

    Returns:
        The QTensor in the shape of the parameter, and notes of the methods, one per layer.

    Raises:
        ValueError: a statistic is missing, or does not fit the parameter.
    """
    found = _found(needed(chain), statistics or {})
    stacked = max((np.ndim(s.count) for s in found.values()), default=stacked)
    layout = Layout.of(weight.shape, config, axis, stacked)
    with jax.ensure_compile_time_eval():  # Statistics are known, also while the form is traced.
        means = [_means(kind, statistic, layout) for kind, statistic in found.items()]
    return _run(weight, means, tuple(found), chain, config, layout)


def _found(
    kinds: Sequence[type[Statistic]], statistics: Mapping[type[Statistic], Any]
) -> dict[type[Statistic], Statistic]:
    """The statistics that are needed."""
    for kind, statistic in statistics.items():
        if type(statistic) is not kind:
            raise ValueError(
                "statistics must map each class to a statistic of it, as jq.collect returns them; "
                f"got {type(statistic).__name__} for {kind!r}. If you have sums of your own, pass "
                "them as SecondMoment(total, count), and no means."
            )
    found = {kind: find(statistics, kind) for kind in kinds}
    lacking = [kind.__name__ for kind, statistic in found.items() if statistic is None]
    if lacking:
        have = ", ".join(kind.__name__ for kind in statistics) or "no statistics"
        raise ValueError(
            f"the method needs {', '.join(lacking)}; got {have}. Pass "
            "statistics=jq.collect(apply, params, batches, rules, method)."
        )
    return {kind: statistic for kind, statistic in found.items() if statistic is not None}


def _means(kind: type[Statistic], statistic: Statistic, layout: Layout) -> jax.Array:
    """The means of a statistic for each matrix, in group order."""
    stack = layout.shape[: layout.stacked]
    wanted = *stack, *kind.shape(layout.columns)
    if statistic.total.shape != wanted or statistic.count.shape != stack:
        raise ValueError(
            f"{kind.__name__} must have the shape {wanted} for a parameter {layout.shape} that is "
            f"contracted along {layout.contracted}; got {statistic.total.shape}. Collect it with "
            "the same rules."
        )
    mean = np.asarray(statistic.finish())
    is_known = np.reshape(statistic.count > 0, (*stack, *(1,) * (mean.ndim - len(stack))))
    # Of slices that met no activations nothing is known: all channels count alike.
    axes = min(len(kind.shape(1)), 2)
    unknown = 1.0 if axes == 1 else np.eye(layout.columns, dtype=np.float32)
    mean = np.where(is_known, mean, unknown).reshape(-1, *kind.shape(layout.columns))
    return jnp.asarray(layout.in_group_order(mean, axes))


@partial(jax.jit, static_argnames=("kinds", "chain", "config", "layout"))
def _run(
    weight: jax.Array,
    means: list[jax.Array],
    kinds: tuple[type[Statistic], ...],
    chain: Chain,
    config: ArrayConfig,
    layout: Layout,
) -> tuple[QTensor, dict[str, jax.Array]]:
    """The quantized parameter, with what changes its activations, and notes."""
    config, axis = matrix_config(config, layout)

    def of_matrix(operands):
        matrix, found = operands
        # JAX cannot sort classes, so a dict by class is not a pytree.
        means: Statistics = dict(zip(kinds, found, strict=True))
        multiplier = rotation = None
        for item in chain[:-1]:
            changed = item.transform(matrix, means, config, axis)
            matrix, factor = changed.weight, changed.multiplier
            if factor is not None:
                means = {kind: kind.scaled(mean, factor) for kind, mean in means.items()}
                multiplier = factor if multiplier is None else multiplier * factor
            if changed.rotation is not None:
                rotation = changed.rotation
                means = rotated(means, rotation)
        q, notes = with_notes(chain[-1](matrix, means, config, axis))
        return dataclasses.replace(q, dtype=weight.dtype), multiplier, rotation, notes

    matrices = layout.matrices(weight.astype(jnp.float32))
    # One matrix after another, so that memory holds the intermediates of one.
    q, multiplier, rotation, notes = jax.lax.map(of_matrix, (matrices, means))
    q = layout.array(q)
    if multiplier is None and rotation is None:
        return q, notes
    if multiplier is not None:
        multiplier = layout.columns_back(multiplier)
    if rotation is not None:
        if layout.moves_columns:
            raise ValueError(
                "a rotation needs groups of adjacent contracted elements; got groups of shape "
                f"{layout.blocks} in a parameter {layout.shape}. Choose groups along one axis."
            )
        rotation = dataclasses.replace(rotation, signs=layout.columns_back(rotation.signs))
    return dataclasses.replace(q, inputs=Inputs(multiplier=multiplier, rotation=rotation)), notes
