"""QLoRA: frozen quantized weights with trainable low-rank adapters."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..core import (
    LowRank,
    QTensor,
    blocks_between,
    describe,
    quantize,
)
from ..tree import Rules, is_quantized
from ..tree.internal import (
    Plan,
    leaves_with_paths,
    select,
    why_unsupported,
)
from .lora_adapters import (
    axes_of,
    begin_at,
    begin_at_zero,
    check_dora,
    check_options,
    check_start,
    input_axes,
    ranks_of,
)
from .lora_starts import Start


def lora_init(
    params: Any,
    rules: Rules,
    rank: int | Mapping[str, int],
    key: jax.Array,
    *,
    alpha: float | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    start: Start | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    platform: str | None = None,
) -> Any:
    """Quantizes selected leaves and adds trainable low-rank adapters to them (QLoRA).

        x @ leaf  =  x @ base + (alpha / rank) * (x @ a) @ b

    The factor on the input side is normal with variance 1 / (number of inputs), the other is zero,
    so that outputs start as those of the base. With any optax optimizer:

        params = lora_init(params, rules, rank=8, key=key)
        trained, frozen = partition(params)
        state = optimizer.init(trained)

        @jax.jit
        def step(trained, state, frozen, batch):
            gradient = jax.grad(lambda t: loss(combine(t, frozen), batch))(trained)
            updates, state = optimizer.update(gradient, state, trained)
            return optax.apply_updates(trained, updates), state

        merged = merge(combine(trained, frozen))

    Args:
        params: any pytree of float arrays; QTensors quantized by the same rules are kept. Those
            with an offset, as in GGUF files, need an asymmetric rule.
        rules: as for `tree.quantize`. Leaves that no rule selects are unchanged, and frozen.
        rank: length of the axis between `a` and `b`; or {pattern: rank} for the selected paths, of
            which the first that matches decides.
        key: random key.
        alpha: adapters are scaled by alpha / rank; None for the rank, a factor of 1.
        use_rslora: whether they are scaled by alpha / sqrt(rank) instead, so that a high rank does
            not learn more slowly (rsLoRA). `LowRank.alpha` is alpha * sqrt(rank) then.
        use_dora: whether the norm of each output is trained apart from its direction (DoRA), which
            learns more at low ranks. Products dequantize the weight, whose norms are computed in
            each step: adapters save memory for optimizer states, but no time.
        start: where base and adapters start: `PiSSA()` or `LoftQ()`; None for the base that
            `tree.quantize` gives, and adapters of zero.
        dtype: floating dtype of `a` and `b`. Products compute in that of the activations and base.
        platform: as for `tree.quantize`.

    Returns:
        The tree with a `LowRank` in place of each selected leaf. The axes that share a scale are
        the contracted ones: `a` has these, `b` the axes after them, and axes before them are those
        of a stack. If they include the last axis, `a` has the axis before the last and `b` the
        last.

    Raises:
        ValueError: rank, alpha, start or dtype is invalid; use_rslora without alpha; a pattern of
            rank matches no selected leaf, or none matches one; as for `tree.quantize`, QTensors
            aside; or a selected leaf has a single axis, adapters already, scales shared along axes
            that are not adjacent, a format, groups or inputs that differ from its rule, or a
            multiplier; or, with a start, it is a QTensor or smaller than the rank; or, with
            use_dora, its rule quantizes activations.

    Source: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, eq. 5; Hu et al. 2021 (LoRA),
        arXiv:2106.09685, section 4.1; Kalajdzievski 2023 (rsLoRA), arXiv:2312.03732, eq. 4;
        Liu et al. 2024 (DoRA), arXiv:2402.09353, eq. 5.

    Example:
        >>> rules, key = jq.Rule("kernel", jq.W8A16), jax.random.key(0)
        >>> params = jq.training.lora_init({"kernel": jnp.ones((4, 2))}, rules, rank=1, key=key)
        >>> params["kernel"].a.shape, params["kernel"].b.shape
        ((4, 1), (1, 2))
    """
    check_options(rank, alpha, dtype, use_rslora, start)
    paths, leaves, chosen, treedef = select(params, rules, _why_unsupported)
    ranks = ranks_of(rank, paths, chosen)
    check_dora(use_dora, paths, chosen)
    check_start(start, paths, leaves, chosen, ranks)
    keys = iter(jax.random.split(key, sum(plan is not None for plan in chosen)))
    result = []
    for leaf, plan, r in zip(leaves, chosen, ranks, strict=True):
        if plan is not None and r is not None:
            weight = float(r if alpha is None else alpha * (math.sqrt(r) if use_rslora else 1))
            begin = begin_at_zero if start is None else partial(begin_at, start, weight / r)
            base, a, b = begin(leaf, plan, r, next(keys), platform)
            factors = a.astype(dtype), b.astype(dtype)
            leaf = LowRank(base, *factors, alpha=weight, config=plan.scheme.weights)
            leaf = leaf.with_magnitude(input_axes(plan, leaf.ndim)) if use_dora else leaf
        result.append(leaf)
    return jax.tree.unflatten(treedef, result)


def trainable_mask(tree: Any) -> Any:
    """Returns a mask of the trained leaves: `a`, `b` and `magnitude` of the adapters.

    For `partition`, `optax.masked` and, by `jax.tree.map`, the labels of `optax.multi_transform`.

    Args:
        tree: from `lora_init`.

    Returns:
        Tree of booleans, with one for each QTensor: a prefix of the tree. Change it to train more.

    Raises:
        ValueError: the tree does not contain adapters.

    Example:
        >>> rules, key = jq.Rule("kernel", jq.W8A16), jax.random.key(0)
        >>> params = jq.training.lora_init({"kernel": jnp.ones((4, 2))}, rules, rank=1, key=key)
        >>> mask = jq.training.trainable_mask(params)["kernel"]
        >>> mask.a, mask.b, mask.base
        (True, True, False)
    """
    _check_adapters(tree)

    def mark(x):
        if not isinstance(x, LowRank):
            return False
        norm = None if x.magnitude is None else True
        return dataclasses.replace(x, base=False, a=True, b=True, magnitude=norm)  # pyright: ignore[reportArgumentType] (a mask)

    return jax.tree.map(mark, tree, is_leaf=is_quantized)


def partition(tree: Any, mask: Any = None) -> tuple[Any, Any]:
    """Splits a tree into a trained and a frozen part. `combine` undoes it.

    Args:
        tree: from `lora_init`.
        mask: tree of booleans like it, or a prefix of it; None for `trainable_mask(tree)`.

    Returns:
        (trained, frozen): two trees, with None in place of the leaves of the other. The first has
        only floating leaves: differentiate with respect to it, pass it to optax, save it.

    Raises:
        ValueError: there are neither adapters nor a mask, the mask is for another tree, or it
            selects a leaf that is not a floating-point array.

    Example:
        >>> trained, frozen = jq.training.partition(
        ...     {"a": jnp.ones(2), "b": jnp.zeros(3)}, {"a": True, "b": False}
        ... )
        >>> trained["b"] is None, frozen["a"] is None
        (True, True)
    """
    mask = trainable_mask(tree) if mask is None else mask
    paths, marks, treedef = leaves_with_paths(mask, None)
    parts = treedef.flatten_up_to(tree)
    for path, is_trained, x in zip(paths, marks, parts, strict=True):
        if is_trained and not _is_floating(x):
            raise ValueError(
                f"Only floating-point arrays can be trained; the mask selects {x!r} at {path!r}. "
                "Mark it False."
            )
    trained = [x if m else None for m, x in zip(marks, parts, strict=True)]
    frozen = [None if m else x for m, x in zip(marks, parts, strict=True)]
    return jax.tree.unflatten(treedef, trained), jax.tree.unflatten(treedef, frozen)


def combine(trained: Any, frozen: Any) -> Any:
    """Joins the two parts of a tree that `partition` split.

    Raises:
        ValueError: the two are not parts of one tree, or both have the same leaf.

    Example:
        >>> jq.training.combine({"a": 1.0, "b": None}, {"a": None, "b": 2.0})
        {'a': 1.0, 'b': 2.0}
    """
    paths, ours, treedef = leaves_with_paths(trained, lambda x: x is None)
    others = treedef.flatten_up_to(frozen)
    for path, x, y in zip(paths, ours, others, strict=True):
        if x is not None and y is not None:
            raise ValueError(
                f"Each leaf must be trained or frozen; got both at {path}. Pass the two trees "
                "that partition returned."
            )
    both = zip(ours, others, strict=True)
    return jax.tree.unflatten(treedef, [y if x is None else x for x, y in both])


def merge(tree: Any) -> Any:
    """Merges the adapters into their bases, quantizing the sums as the bases were.

        base  <-  quantize(dequantize(base) + (alpha / rank) * a @ b, config)

    To get float arrays with the adapters merged instead, call `tree.dequantize`.

    Args:
        tree: from `lora_init`, trained; not a slice of a stack.

    Returns:
        The tree with a QTensor in place of each `LowRank`, with the format, groups, order, dtype
        and `inputs` of its base.

    Raises:
        ValueError: the tree does not contain adapters.

    Error: that of `jaxquant.quantize`: in integer formats at most scale/2 per element that is not
        clipped, with the new scale. Adapters far below the scale may be lost.
    Source: Hu et al. 2021 (LoRA), arXiv:2106.09685, section 4.1.

    Example:
        >>> rules, key = jq.Rule("kernel", jq.W8A16), jax.random.key(0)
        >>> params = jq.training.lora_init({"kernel": jnp.ones((4, 2))}, rules, rank=1, key=key)
        >>> jq.training.merge(params)["kernel"].dequantize().tolist()[0]
        [1.0, 1.0]
    """
    _check_adapters(tree)
    return jax.tree.map(
        lambda x: _merge(x) if isinstance(x, LowRank) else x, tree, is_leaf=is_quantized
    )


@jax.jit
def _merge(x):
    # Not rounded to bfloat16 in between.
    compute = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    total = x.astype(compute).dequantize()
    blocks = blocks_between(x.base.shape, x.base.reorder(None).scale.shape)
    axis = tuple(a for a, block in enumerate(blocks) if block > 1)
    config = x.config
    if config.format.group_size is None:
        sizes = tuple(blocks[a] for a in axis)
        config = dataclasses.replace(config, group_size=sizes, per_tensor=False)
    q = quantize(total, config, axis).astype(x.dtype)
    return dataclasses.replace(q, inputs=x.base.inputs).reorder(x.base.order)


def _is_floating(x):
    is_array = hasattr(x, "dtype") and not is_quantized(x)
    return is_array and jnp.issubdtype(x.dtype, jnp.floating)


def _check_adapters(tree):
    if not any(isinstance(x, LowRank) for x in jax.tree.leaves(tree, is_leaf=is_quantized)):
        raise ValueError(
            f"The tree must come from lora_init; got {jax.tree.structure(tree)}, which has no "
            "adapters."
        )


def _why_unsupported(leaf: Any, plan: Plan) -> str | None:
    """Why a leaf cannot have adapters, or None."""
    if isinstance(leaf, LowRank):
        return f"already has adapters ({leaf!r}); merge them first, or give it a rule with None"
    is_base = isinstance(leaf, QTensor)
    why_not = _why_unsupported_base(leaf, plan) if is_base else why_unsupported(leaf, plan)
    if why_not is not None:
        return why_not
    axes = axes_of(plan, leaf.ndim)
    if leaf.ndim < 2:
        return f"has shape {leaf.shape}; adapters need two axes: give it a rule with None"
    if axes != tuple(range(axes[0], axes[-1] + 1)):
        return (
            f"shares scales along axes {axes} of shape {leaf.shape}; adapters need "
            "adjacent axes: move the axes, or give it a rule with None"
        )
    return None


def _why_unsupported_base(q, plan):
    """Why a quantized leaf does not match its rule, or None."""
    name = None if q.inputs is None else q.inputs.changing_field
    if name is not None:
        return f"has inputs.{name} ({q!r}), which adapters ignore; apply it to the weight first"
    try:
        abstract = jax.ShapeDtypeStruct(q.shape, q.dtype)
        wanted = jax.eval_shape(partial(quantize, axis=plan.axis), abstract, plan.scheme.weights)
    except ValueError as error:
        return str(error)
    found = q.reorder(None)
    # Files such as GGUF's Q4_1 have an offset where `quantize` has a zero point.
    kinds = [
        (x.format, x.scale.shape, x.zero_point is None and x.offset is None)
        for x in (found, wanted)
    ]
    inputs = None if q.inputs is None else q.inputs.config
    if kinds[0] == kinds[1] and inputs == plan.scheme.inputs:
        return None
    return (
        f"is not quantized as its rule says: {describe(q)}, scales {found.scale.shape}, "
        f"and not {describe(wanted)}, scales {wanted.scale.shape}, inputs {plan.scheme.inputs}"
    )
