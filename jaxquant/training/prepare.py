"""Quantization-aware training (QAT): parameters that are quantized again in each step."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..core import (
    ArrayConfig,
    ArrayLike,
    Axes,
    Inputs,
    MinMSE,
    QTensor,
    Range,
    TrainedArray,
    normalize_axes,
    quantize,
    scale_values,
    shared_axes,
)
from ..tree import Rules
from ..tree.internal import leaves_with_paths, select, stored_order
from .fake_quantize import (
    LearnedRange,
    LearnedStep,
    gradient_factor,
    quantize_for_training,
    scale_gradient,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Prepared(ArrayLike, TrainedArray):
    """A weight in QAT: operations see it quantized, and its float array gets gradients. A pytree.

    Attributes:
        weight: the float array that is trained.
        learned: its trainable step or range; None to compute the range by `config.range`.
        inputs: how activations that are multiplied by it are quantized. A calibrated scale is
            trained as a learned step, whose sign is ignored, and so is a float zero point.
        config: how it is quantized, static.
        axis: the axes along which elements share a scale, static. `prepare` counts them from the
            end, so that a stack of layers can be scanned.
        order: order in which its trailing axes are stored once it is quantized, static.
        result_dtype: dtype that operations see, static; None for that of the weight.

    Example:
        >>> params = jq.training.prepare({"kernel": jnp.ones((4, 2))}, jq.W8A16)
        >>> params["kernel"]
        Prepared(int8 4x2, float32)
    """

    weight: jax.Array
    learned: LearnedStep | LearnedRange | None = None
    inputs: Inputs | None = None
    config: ArrayConfig = dataclasses.field(kw_only=True, metadata={"static": True})
    axis: Axes = dataclasses.field(default=-2, kw_only=True, metadata={"static": True})
    order: tuple[int, ...] | None = dataclasses.field(
        default=None, kw_only=True, metadata={"static": True}
    )
    result_dtype: Any = dataclasses.field(default=None, kw_only=True, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        """Dtype that operations see."""
        return jnp.dtype(self.result_dtype or self.weight.dtype)

    def astype(self, dtype: jax.typing.DTypeLike) -> "Prepared":
        """The same weight and codes in another dtype, such as bfloat16, for operations."""
        return dataclasses.replace(self, result_dtype=jnp.dtype(dtype))

    def quantize(self) -> QTensor:
        """The weight as a QTensor whose `values` propagate gradients."""
        q = quantize_for_training(self.weight, self.config, self.axis, self.learned)
        q = q.astype(self.dtype).reorder(self.order)
        # Otherwise XLA would swap the axes of the product instead of those of the codes, and sum in
        # a different order than with the converted weight.
        fixed = jax.lax.optimization_barrier(dataclasses.replace(q, values=None))
        return dataclasses.replace(fixed, values=q.values, inputs=self._trained_inputs())

    def _trained_inputs(self):
        inputs = self.inputs
        if inputs is None or inputs.config is None or inputs.scale is None:
            return inputs
        # The number of features that share the step in one product (LSQ, section 2.2). If scales
        # are shared along all axes, the last axis is that of the output.
        axes = shared_axes(self.axis, self.ndim, self.config)
        axes = axes if len(axes) < self.ndim else range(self.ndim - 1)
        features = math.prod(self.shape[a] for a in axes)
        factor = gradient_factor(features, inputs.config)
        scale, zero_point = scale_gradient(jnp.abs(inputs.scale), factor), inputs.zero_point
        if zero_point is not None and jnp.issubdtype(zero_point.dtype, jnp.floating):
            zero_point = scale_gradient(zero_point, factor)
        return dataclasses.replace(inputs, scale=scale, zero_point=zero_point)

    def __repr__(self) -> str:
        if not hasattr(self.weight, "shape"):
            # JAX fills pytrees with placeholders, and prints them in its errors.
            return f"Prepared({self.config.format}, weight={self.weight!r})"
        shape = "x".join(map(str, self.shape))
        learned = "" if self.learned is None else f", {type(self.learned).__name__}"
        return f"Prepared({self.config.format} {shape}{learned}, {self.dtype})"


def init_learned(params: Any, rules: Rules, range: Range | None = MinMSE()) -> Any:  # noqa: B008 (frozen)
    """Returns initial learned steps (LSQ) and ranges: those of post-training quantization.

    Args:
        params: any pytree of float arrays.
        rules: as for `tree.quantize`.
        range: the part of each group that they span; None for config.range.

    Returns:
        A tree like params with a `LearnedStep` (symmetric) or `LearnedRange` (asymmetric) in place
        of each selected leaf, and None in place of the others.

    Raises:
        ValueError: as for `tree.quantize`.

    Source: Bhalgat et al. 2020 (LSQ+), arXiv:2004.09576, section 3.2: the range with the least
        squared error.

    Example:
        >>> learned = jq.training.init_learned({"kernel": jnp.ones((4, 2))}, jq.W8A16)
        >>> learned["kernel"].scale.shape
        (1, 2)
    """
    _, leaves, chosen, treedef = select(params, rules)
    learned = [
        None if plan is None else _first(leaf, plan, range)
        for leaf, plan in zip(leaves, chosen, strict=True)
    ]
    return jax.tree.unflatten(treedef, learned)


def _first(leaf, plan, range):
    config = plan.scheme.weights
    q = quantize(leaf, dataclasses.replace(config, range=range or config.range), plan.axis)
    scale = scale_values(q.scale)
    if config.symmetric:
        return LearnedStep(scale)
    zero = 0 if q.zero_point is None else q.zero_point.astype(scale.dtype)
    qmin, qmax = config.bounds
    return LearnedRange((qmin - zero) * scale, (qmax - zero) * scale)


def prepare(params: Any, rules: Rules, learned: Any = None, *, platform: str | None = None) -> Any:
    """Prepares selected leaves for QAT: operations see them quantized, gradients pass through.

        forward:  what `jaxquant` computes with tree.quantize(params, rules)
        backward: gradients for the float weights and for `learned` (see `fake_quantize`)

    The result is a pytree of float arrays: differentiate with respect to it, pass it to optax,
    save it. `tree.quantize` accepts the same rules.

    Args:
        params: any pytree of float arrays.
        rules: as for `tree.quantize`; the activations of a scheme are quantized too.
        learned: tree from `init_learned` for the same leaves; None to compute the range of each
            weight again in each step.
        platform: "cpu", "gpu" or "tpu", where the converted tree will run; None for this one.

    Returns:
        The tree with a `Prepared` in place of each selected leaf.

    Raises:
        ValueError: as for `tree.quantize`; or `learned` is for other leaves than the rules select,
            or does not fit a leaf and its config.

    Error: products equal those after `convert` bit for bit, if both run under `jax.jit` or neither
        does. Operations that XLA fuses with a product may differ in the last bit.

    Example:
        >>> params = jq.training.prepare({"kernel": jnp.full((4, 2), 0.3)}, jq.W8A16)
        >>> def loss(params):
        ...     return jnp.sum(jq.matmul(jnp.ones((1, 4)), params["kernel"]))
        >>> jax.grad(loss)(params)["kernel"].weight.shape
        (4, 2)
    """
    paths, leaves, chosen, treedef = select(params, rules)
    found = dict(zip(*leaves_with_paths(learned, _is_learned)[:2], strict=True))
    selected = {p for p, plan in zip(paths, chosen, strict=True) if plan is not None}
    if learned is not None and set(found) != selected:
        raise ValueError(
            f"learned must be for the leaves that the rules select, {sorted(selected)}; got "
            f"{sorted(found)}. Make it with init_learned(params, rules)."
        )
    prepared = [
        leaf if plan is None else _prepare(path, leaf, plan, found.get(path), platform)
        for path, leaf, plan in zip(paths, leaves, chosen, strict=True)
    ]
    return jax.tree.unflatten(treedef, prepared)


def _prepare(path, leaf, plan, learned, platform):
    scheme, axis = plan.scheme, _from_end(plan.axis, leaf.ndim)
    config = scheme.weights
    try:
        jax.eval_shape(partial(quantize_for_training, axis=axis), leaf, config, learned=learned)
    except ValueError as error:
        raise ValueError(
            f"learned does not fit {path}: {error} Make it with "
            "init_learned(params, rules), from the same rules."
        ) from error
    inputs = None if scheme.inputs is None else Inputs(scheme.inputs)
    order = stored_order(leaf, plan, platform)
    return Prepared(jnp.asarray(leaf), learned, inputs, config=config, axis=axis, order=order)


def _from_end(axis, ndim):
    """The same axes, counted from the end."""
    axes = tuple(a - ndim for a in normalize_axes(axis, ndim))
    return axes[0] if isinstance(axis, int) else axes


def convert(prepared: Any) -> Any:
    """Converts each `Prepared` to the QTensor that training used, for serving.

    Args:
        prepared: tree from `prepare`, trained.

    Returns:
        The tree with a QTensor in place of each `Prepared`. Products equal those of the prepared
        tree bit for bit (see `prepare`).

    Raises:
        ValueError: the tree does not contain a `Prepared`.

    Example:
        >>> prepared = jq.training.prepare({"kernel": jnp.ones((4, 2))}, jq.W8A16)
        >>> jq.training.convert(prepared)["kernel"].format.name
        'int8'
    """
    if not any(map(_is_prepared, jax.tree.leaves(prepared, is_leaf=_is_prepared))):
        paths = ", ".join(leaves_with_paths(prepared)[0][:8]) or "none"
        raise ValueError(
            f"convert expects a tree from prepare; got one without a Prepared, with paths {paths}."
        )
    return jax.tree.map(
        lambda x: jax.jit(Prepared.convert)(x) if _is_prepared(x) else x,
        prepared,
        is_leaf=_is_prepared,
    )


def _is_prepared(x: object) -> bool:
    return isinstance(x, Prepared)


def _is_learned(x: object) -> bool:
    return isinstance(x, LearnedStep | LearnedRange)
