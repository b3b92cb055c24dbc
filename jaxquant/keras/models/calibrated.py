"""Quantizes the weights of a model by methods that see its activations, such as GPTQ and AWQ."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import keras
import numpy as np

from ...calibration import Statistics, collect
from ...core import QTensor
from ...methods import Statistic
from ...methods.internal import as_chain, is_transform, needed
from ...tree import Rule
from ...tree import quantize as quantize_tree
from ...tree.internal import powers, why_unsupported
from ..configs import QuantizationConfig, SchemeConfig
from ..layer import of_layer
from .functional import nested, pure_call

Chosen = list[tuple[Any, list[str]]]


class Weight(NamedTuple):
    """One weight that a method quantizes.

    Attributes:
        layer, name: where it is declared.
        key: the parts of its path among the parameters of the model.
        rule: how `tree.quantize` quantizes it.
    """

    layer: Any
    name: str
    key: tuple[str, ...]
    rule: Rule

    @property
    def value(self) -> jax.Array:
        """The float weight."""
        return self.layer.float_weights[self.name].value


class Unfit(NamedTuple):
    """A weight of a layer that does not fit its method, and why."""

    layer: Any
    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.layer.weight_state.path(self.name)}: {self.why}"


def weights_with_methods(
    model: Any, chosen: Chosen, config: SchemeConfig, method: Any
) -> tuple[list[Weight], list[Unfit]]:
    """The chosen weights that have a method, and those that do not fit their method.

    Tables are rounded to nearest, because lookups do not multiply activations. So are the
    projections of a ReversibleEmbedding.
    """
    rules = config.rules if isinstance(config, QuantizationConfig) else ()
    if method is None and all(rule.method is None for rule in rules):
        return [], []
    _, places = pure_call(model)
    keys = {id(place): key for key, place in places.items()}
    found, unfit = [], []
    with_activations = (x for x in chosen if not isinstance(x[0], keras.layers.Embedding))
    for layer, names in with_activations:
        for name in names:
            state, key = layer.weight_state, keys[id(layer.float_weights[name])]
            rule = state.tree_rule(name, config, "/".join(key), method)
            if isinstance(rule, str):
                unfit.append(Unfit(layer, name, rule))
            elif rule.method is not None:
                found.append(Weight(layer, name, key, rule))
    whys = [(x, _why_unsupported(x)) for x in found]
    unfit += [Unfit(x.layer, x.name, why) for x, why in whys if why is not None]
    return [x for x, why in whys if why is None], unfit


def _why_unsupported(weight: Weight) -> str | None:
    """Why a weight does not support its method, or None."""
    plan = weight.rule.plan()
    assert plan is not None, "the rule of a weight has a scheme"
    layer, chain = weight.layer, as_chain(weight.rule.method)
    declared = layer.declared_weights[weight.name]
    transforms = [type(x).__name__ for x in chain if is_transform(x)]
    observing = [type(x).__name__ for x in chain if x.statistics]
    if (transforms or observing) and of_layer(declared.in_groups, layer):
        return (
            f"{(transforms or observing)[0]} does not support convolutions in groups, such as "
            "depthwise ones; give it a rule with method=jq.methods.Nearest() or None, or keep its "
            "layer in float"
        )
    if transforms and of_layer(declared.has_windows, layer):  # One multiplier per channel.
        return (
            f"{transforms[0]} changes each element of a window differently, and convolutions can "
            "only change channels; give it a rule with method=jq.methods.GPTQ() or None, or keep "
            "its layer in float"
        )
    return why_unsupported(weight.value, plan)


def quantize_by_methods(
    model: Any, weights: list[Weight], batches: Iterable[Any] | None, progress: Any
) -> dict[int, dict[str, QTensor]]:
    """The quantized weights by the id of their layer and their name.

    Args:
        model: float, with these weights.
        weights: those that have a method.
        batches: what the model is called with, one after another.
        progress: as for `tree.quantize`.

    Raises:
        ValueError: a method needs batches and there are none; or as for `jaxquant.collect` and
            `tree.quantize`.
    """
    apply, places = pure_call(model)
    values: dict[Any, Any] = dict(places)
    params = nested({key: place.value for key, place in values.items()})
    rules = [weight.rule for weight in weights]
    methods = [item for rule in rules for item in as_chain(rule.method)]
    kinds = {kind for rule in rules for kind in needed(as_chain(rule.method))}
    if kinds and batches is None:
        names = ", ".join(sorted({type(m).__name__ for m in methods if m.statistics}))
        raise ValueError(
            f"{names} needs batches, what the model is called with, to see its activations; got "
            "batches=None. Pass batches=[x, ...]."
        )
    statistics = None
    if kinds and batches is not None:
        observed = [rule for rule in rules if needed(as_chain(rule.method))]
        call = _with_shapes_in_errors(apply, model)
        statistics = collect(call, params, batches, observed, list(kinds))
    found = _quantized(weights, statistics, progress)
    stacks = [weight for weight in weights if _has_several_multipliers(weight, found[weight.key])]
    if stacks and statistics is not None:
        pooled = {"/".join(x.key): _pooled(statistics["/".join(x.key)]) for x in stacks}
        found |= _quantized(stacks, Statistics(pooled, statistics.is_complete), None)
    by_layer: dict[int, dict[str, QTensor]] = {}
    for weight in weights:
        by_layer.setdefault(id(weight.layer), {})[weight.name] = found[weight.key]
    return by_layer


def _with_shapes_in_errors(apply: Callable[..., Any], model: Any) -> Callable[..., Any]:
    """The function of a model, with an error that shows the batch that it cannot be called with."""

    def call(params: Any, batch: Any) -> Any:
        try:
            return apply(params, batch)
        except (TypeError, ValueError) as error:
            shapes = keras.tree.map_structure(lambda x: tuple(np.shape(x)), batch)
            wanted = getattr(model, "input_shape", None)
            raise ValueError(
                f"batches must be a list of what model {model.name!r} is called with, one after "
                f"another; got a batch of shape {shapes}"
                f"{'' if wanted is None else f' for inputs of shape {wanted}'}. Pass batches=[x] "
                f"for one batch x, without labels. The model raises: {error}"
            ) from error

    return call


def _quantized(
    weights: list[Weight], statistics: Statistics | None, progress: Any
) -> dict[tuple[str, ...], QTensor]:
    """The quantized weights by their keys."""
    values, rules = {x.key: x.value for x in weights}, [x.rule for x in weights]
    made = quantize_tree(nested(values), rules, statistics=statistics, progress=progress)
    return {x.key: functools.reduce(operator.getitem, x.key, made) for x in weights}


def _has_several_multipliers(weight: Weight, q: QTensor) -> bool:
    """Whether the matrices of a stack, such as experts, have one multiplier each."""
    multiplier = None if q.inputs is None else q.inputs.multiplier
    axes = (weight.rule.axis,) if isinstance(weight.rule.axis, int) else weight.rule.axis
    assert axes is not None, "the rule of a weight names its axes"
    return multiplier is not None and multiplier.ndim > len(axes)


def _pooled(found: Mapping[type[Statistic], Any]) -> dict[type[Statistic], Any]:
    """Statistics of a stack as of one matrix that meets the activations of all.

    A layer multiplies its activations before the matrices of a stack divide them, so that these
    have one multiplier in common.
    """
    return {kind: _pooled_over_stack(statistic) for kind, statistic in found.items()}


def _pooled_over_stack(statistic: Any) -> Any:
    axes = statistic.count.ndim
    flat = jax.tree.map(lambda x: np.reshape(x, (-1, *np.shape(x)[axes:])), statistic)
    parts = [jax.tree.map(operator.itemgetter(n), flat) for n in range(statistic.count.size)]
    return functools.reduce(lambda a, b: a.merge(b), parts)


def take_over(layer: Any, config: SchemeConfig, tensors: dict[str, QTensor]) -> None:
    """Gives a layer weights that methods have quantized, and rounds its others to nearest.

    Raises:
        ValueError: a method has changed the activations in a way that layers do not store.
    """
    state = layer.weight_state
    paths = {name: state.path(name) for name in layer.declared_shapes}
    multipliers = {n: q.inputs.multiplier for n, q in tensors.items() if q.inputs is not None}
    shapes = {name: x.shape for name, x in multipliers.items() if x is not None}
    for name, shape in shapes.items():
        _check_multiplier(name, shape, state.plan(name, config))
    if shapes:
        rules = [(f"*/{name}", config.rule_for(path)) for name, path in paths.items()]
        config = QuantizationConfig([_rule(*x) for x in rules], shapes)
    else:
        config = config.for_weights(paths)
    found = {}
    for name, like in layer.likes(config).items():
        value = layer.float_weights[name].value
        q = tensors.get(name)
        found[name] = (
            layer.quantized_values(name, value, config) if q is None else _stored(name, q, like)
        )
        if q is not None:
            signal, noise, _ = (float(x) for x in powers(value, q))
            state.noise[name] = math.sqrt(noise / signal) if signal else 0.0
    layer.take_over(config, found)


def _rule(pattern: str, rule: Rule | None) -> Rule:
    """The rule of one weight of a layer, wherever it is loaded."""
    rule = Rule(pattern, None) if rule is None else rule
    return dataclasses.replace(rule, pattern=pattern, required=False)


def _check_multiplier(name: str, shape: tuple[int, ...], plan: Any) -> None:
    """Checks that all matrices of a stack, such as experts, have the same multiplier."""
    axes, _ = plan
    if len(shape) != len(axes):
        raise ValueError(
            f"Matrices of a stack must have one multiplier in common; got one of shape {shape} for "
            f"{name!r}, which contracts the axes {axes}. Give it a rule with method="
            "jq.methods.GPTQ()."
        )


def _stored(name: str, q: QTensor, like: QTensor) -> QTensor:
    """The result of a method in the form that a layer stores."""
    q = q.reorder(like.order)
    bare, wanted = (dataclasses.replace(x, inputs=None) for x in (q, like))
    extra = None if q.inputs is None else (q.inputs.permutation, q.inputs.rotation)
    if jax.tree.leaves(extra) or not _alike(bare, wanted):
        field = None if q.inputs is None else q.inputs.changing_field
        raise ValueError(
            f"Methods for Keras layers must give codes, scales and at most a multiplier, like "
            f"{like!r}; got {q!r} with {field or 'other arrays'} for {name!r}. Quantize the "
            "parameters of jk.functional(model) with this method, and lift its function."
        )
    return q


def _alike(a: Any, b: Any) -> bool:
    """Whether two weights have the same leaves."""
    found = [[(x.shape, x.dtype) for x in jax.tree.leaves(y)] for y in (a, b)]
    return found[0] == found[1]
