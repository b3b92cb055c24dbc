"""Quantizes a model layer by layer, with the activations of the layers quantized before."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import tree
from ..calibration.internal import PAIR, Collector
from ..core import concatenate_codes
from ..lift import lift
from ..methods import CrossMoment, Statistic
from ..methods.internal import as_chain, needed
from ..tree import Progress, Rules
from ..tree.internal import Plan, leaves_with_paths, progress_bar, quantize_by_plan, select
from .block_rounding import Block, BlockRounding, squared_error


def sequential(
    block: Callable[[Any, Any], Any],
    layers: Any,
    x: Any,
    rules: Rules,
    *,
    method: Any = None,
    iterations: int = 0,
    seed: int = 0,
    progress: Progress | bool | None = None,
    platform: str | None = None,
) -> Any:
    """Quantizes layers one after another, with the errors of those before in their activations.

        for each layer p:
            y = block(p, x)                                    of the floating-point model
            q = method(p, statistics of block(p, x) and of block(q, x_q)), parameter by parameter
            q = argmin over roundings of |block(q, x_q) - y|^2          if iterations > 0
            x, x_q = y, block(q, x_q)

    Parameters of a layer are quantized in the order in which it multiplies with them, those with
    the same activations at once, and each sees what the ones before leave of the activations. With
    `GPTQ(repair=1)` this is Qronos: each parameter repairs what all before it cause. With
    `iterations`, it is AutoRound as published: rounding offsets and ranges of all weights of a
    layer (see `methods.AutoRound`) are trained by signed gradient descent, from the codes of
    `method`.

    Layers of the same structure share one compiled program. Memory holds the activations of one
    layer, three times.

    Args:
        block: (parameters of one layer, activations) -> activations of the same shapes; any
            function that `jaxquant.lift` transforms.
        layers: list of parameter trees, or one tree of arrays with a leading axis of layers, as
            for `lax.scan`.
        x: activations before the first layer, a pytree of arrays; or a list of batches of them.
        rules: as for `tree.quantize`, for the parameters of one layer.
        method: as for `tree.quantize`; its statistics are collected here.
        iterations: steps of training per layer; 0 trains nothing. The paper uses 200, or 1000 for
            the best results.
        seed: of the order of the batches in training.
        progress: as for `tree.quantize`, per layer, with the relative squared error of its outputs.
        platform: as for `tree.quantize`.

    Returns:
        The layers like those given, with QTensors.

    Raises:
        ValueError: there are no layers or batches, iterations is negative, block returns
            activations of other shapes, a layer is rotated and to be trained; or as for
            `tree.quantize` and `collect`.

    Guarantee: in training, the squared error of the outputs of a layer on all batches is not
        larger than with the codes of `method`.
    Source: Frantar et al. 2022, arXiv:2210.17323, section 4; Zhang et al. 2025, arXiv:2505.11695;
        Cheng et al. 2023, arXiv:2309.05516, section 3.

    Example:
        >>> def block(params, x):
        ...     return x + jnp.tanh(x @ params["kernel"])
        >>> layers = {"kernel": jax.random.normal(jax.random.key(0), (3, 16, 16))}
        >>> x = jax.random.normal(jax.random.key(1), (64, 16))
        >>> config = jq.ArrayConfig(format=jq.INT4)
        >>> rules = [jq.Rule("kernel", config, axis=0)]
        >>> q = jq.tuning.sequential(block, layers, x, rules, method=jq.methods.GPTQ(repair=1))
        >>> q["kernel"].format, q["kernel"].shape
        (int4, (3, 16, 16))
    """
    parts, batches = _parts(layers), x if isinstance(x, list) else [x]
    if not parts or not batches or iterations < 0:
        raise ValueError(
            "sequential needs layers, batches and a number of iterations that is not negative; got "
            f"{len(parts)} layers, {len(batches)} batches and iterations={iterations}."
        )
    lifted = lift(block)
    run, collectors = jax.jit(lifted), _Collectors(block)
    train = BlockRounding(lifted, iterations, seed)
    exact, found, result = batches, batches, []
    with progress_bar(progress, len(parts)) as report:
        for number, params in enumerate(parts):
            outputs = [_checked(run(params, x), x) for x in exact]
            plans = _plans(params, rules, method)
            _, leaves, treedef = leaves_with_paths(params)
            for stage in collectors.stages(params, rules, plans, exact, found, leaves):
                _quantize(leaves, plans, *stage, platform)
            quantized = jax.tree.unflatten(treedef, leaves)
            if iterations:
                pairs = list(zip(found, outputs, strict=True))
                quantized = train(params, quantized, plans, pairs)
            result.append(quantized)
            exact, found = outputs, [run(quantized, x) for x in found]
            error = _relative_error(found, exact)
            report(number + 1, len(parts), f"layer {number}, error {error:.2e}")
    if isinstance(layers, list | tuple):
        return result
    return jax.tree.map(lambda *leaves: concatenate_codes([x[None] for x in leaves]), *result)


def _parts(layers: Any) -> Sequence[Any]:
    """The parameters of each layer."""
    if isinstance(layers, list | tuple):
        return layers
    lengths = {len(leaf) if jnp.ndim(leaf) else None for leaf in jax.tree.leaves(layers)}
    if len(lengths) > 1 or None in lengths:
        raise ValueError(
            "layers must be a list, or a tree of arrays with the same leading length; got lengths "
            f"{sorted(map(str, lengths))}."
        )
    count = next(iter(lengths), 0)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(count or 0)]


def _plans(params: Any, rules: Rules, method: Any) -> dict[int, Plan]:
    """The plans of the selected leaves, by number, each with its method if there is one."""
    _, _, plans, _ = select(params, rules)
    chain = None if method is None else as_chain(method)
    return {
        i: plan._replace(method=plan.method or chain)
        for i, plan in enumerate(plans)
        if plan is not None
    }


def _quantize(
    leaves: list[Any],
    plans: Mapping[int, Plan],
    paths: Mapping[int, str],
    statistics: Mapping[str, Any],
    platform: str | None,
) -> None:
    """Replaces leaves, whose paths are given by number, with QTensors."""
    for i, path in paths.items():
        leaves[i] = quantize_by_plan(path, leaves[i], plans[i], statistics.get(path), platform)


class _Collectors:
    """Collects the statistics of layers, with one collector for each kind of layer."""

    def __init__(self, block: Block):
        self._block = block
        self._collectors: dict[Any, Collector] = {}
        self._stages: dict[Any, list[tuple[int, ...]]] = {}

    def stages(
        self,
        params: Any,
        rules: Rules,
        plans: Mapping[int, Plan],
        exact: list[Any],
        found: list[Any],
        leaves: list[Any],
    ) -> Iterator[tuple[dict[int, str], Mapping[str, Any]]]:
        """Paths of the leaves that are quantized next, and the statistics of their activations.

        Args:
            params, rules, plans: of the layer.
            exact, found: activations of the float model and of the quantized one.
            leaves: those of the layer, in which the caller replaces what is quantized before it
                asks for the next.
        """
        kinds = dict.fromkeys(
            kind for plan in plans.values() if plan.method for kind in needed(plan.method)
        )
        names, _, treedef = leaves_with_paths(params)
        if not kinds:
            yield {i: names[i] for i in plans}, {}
            return
        key = treedef, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        if key not in self._collectors:
            apply = self._of_both if CrossMoment in kinds else self._block
            self._collectors[key] = Collector(apply, params, rules, list(kinds))
        collector, statistics = self._collectors[key], None
        pairs = list(zip(exact, found, strict=True))

        def collected(only: Iterable[int]) -> Mapping[str, Any]:
            now = tree.dequantize(jax.tree.unflatten(treedef, leaves))
            if CrossMoment in kinds:
                return collector(params, pairs, now, only=only)
            return collector(now, found, only=only)

        if key not in self._stages:
            statistics = collected(plans)
            self._stages[key] = _with_equal_activations(collector.order, names, statistics)
        for stage in self._stages[key]:
            yield {i: names[i] for i in stage}, statistics or collected(stage)
            statistics = None

    def _of_both(self, params: Any, pair: tuple[Any, Any]) -> Any:
        """The block on the activations of one of the models that run side by side."""
        is_exact = jax.lax.axis_index(PAIR) == 0
        return self._block(params, jax.tree.map(lambda a, b: jnp.where(is_exact, a, b), *pair))


def _with_equal_activations(
    order: Sequence[int], paths: Sequence[str], statistics: Mapping[str, Any]
) -> list[tuple[int, ...]]:
    """Leaves in the order of their products, those that meet the same activations together."""
    stages: list[tuple[int, ...]] = []
    for i in order:
        is_equal = stages and _are_equal(statistics[paths[stages[-1][0]]], statistics[paths[i]])
        stages = [*stages[:-1], (*stages[-1], i)] if is_equal else [*stages, (i,)]
    return stages


def _are_equal(a: Mapping[Any, Statistic], b: Mapping[Any, Statistic]) -> bool:
    return all(np.array_equal(statistic.total, b[kind].total) for kind, statistic in a.items())


def _checked(outputs: Any, x: Any) -> Any:
    """The outputs of a block, which become the input of the next."""
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (outputs, x)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"block must return activations of the shapes of its input, {shapes[1]}; got "
            f"{shapes[0]}."
        )
    return outputs


def _relative_error(found: list[Any], exact: list[Any]) -> float:
    """The squared error of all batches, relative to the squares."""
    zeros = jax.tree.map(jnp.zeros_like, exact)
    return float(squared_error(found, exact)) / max(float(squared_error(exact, zeros)), 1e-30)
