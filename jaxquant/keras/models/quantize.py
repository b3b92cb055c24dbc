"""Quantizes whole Keras models in one step."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import keras

from ...core import ArrayConfig, QTensor, Scheme, normalize_axes
from ...tree import Progress, Report, ReportRow, Rules, report
from ...tree.internal import (
    advice_for,
    check_progress,
    histogram,
    progress_bar,
    row_of,
    sqnr_of,
)
from .. import compat
from ..configs import QuantizationConfig, SchemeConfig, as_config
from ..layer import QuantizableMixin
from .calibrated import Chosen, Weight, quantize_by_methods, take_over, weights_with_methods
from .checks import Keep, check_has_weights, raise_problems
from .convert import converter
from .state import share_variables
from .stock_methods import STOCK_METHODS, calibration_of, check_alone


def quantize(
    model: keras.Model,
    rules: Rules | str | keras.quantizers.QuantizationConfig,
    *,
    method: Any = None,
    batches: Iterable[Any] | None = None,
    progress: Progress | bool | None = None,
    keep: Keep = (),
    strict: bool = True,
) -> tuple[Any, Report]:
    """Copies a model as `convert` does, and quantizes the copy.

    The given model is not changed. If any weight cannot be quantized, an error lists all such
    weights and nothing is returned. The quantized model is not compiled: compile it to train its
    biases or LoRA weights, or to choose the sampler of a CausalLM of KerasHub, whose `generate`
    then runs on codes.

    Args:
        model: built, of any class; as for `convert`. Its layers may be quantizable already.
        rules: "int8", "int4" or "float8"; a Scheme or ArrayConfig for every quantizable weight;
            rules by path, such as {"encoder/*": NF4A16, "*/kernel": W8A8}, as for
            `QuantizationConfig`; or a config of `jaxquant.keras`, or of Keras. A GPTQConfig or
            AWQConfig of Keras stands for its scheme, method and batches.
        method: how the codes of weights that are multiplied are chosen, such as
            `jaxquant.methods.GPTQ()`, or a list of transforms and a method, as for
            `jaxquant.tree.quantize`; None rounds to nearest. A rule with its own method overrides
            it.
        batches: what the model is called with, one after another, for methods that need to see
            activations.
        progress: True for a progress bar on standard error, or a function that is called after
            each weight with (number done, total, path).
        keep: names and classes of layers that are copied as they are and not quantized.
        strict: False leaves in float what cannot be quantized, and reports the reason: weights
            that hold NaN or Inf, or do not fit the scheme or the method; custom layers that
            multiply with their own weights and cannot be lifted; and layers that cannot be made
            from their config, which the copy then shares with the model.

    Returns:
        The quantized model, and a report with one row per weight.

    Raises:
        ValueError: lists all problems: what `convert` does not support; rules that match no
            weight, or select none; weights that are already quantized; and those that hold NaN or
            Inf or do not fit the scheme, unless `strict` is False and others are quantized; so are
            weights that do not fit their method: groups that do not divide an axis; convolution
            kernels of several pixels with a transform, such as AWQ; convolutions in groups with a
            method that sees activations. Or a method needs batches and there are none, or there
            are batches and no method, or a method gives weights that layers do not store. Or
            `strict` is neither True nor False, or `progress` none of the above.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
        >>> quantized, report = jk.quantize(model, {"*/head/*": jq.W8A8})
        >>> report.rows[0].scheme
        'int8 per channel, int8 inputs'
        >>> x = jax.random.normal(jax.random.key(0), (32, 4))
        >>> quantized, _ = jk.quantize(model, jq.W8A16, method=jq.methods.GPTQ(), batches=[x])
    """
    check_progress(progress)
    if isinstance(rules, STOCK_METHODS):
        check_alone(method, batches)
        rules, method, batches = calibration_of(rules, model)
    config = config_of(rules)
    rewriter = converter(keep, strict)
    copy = rewriter.copy(model, share_variables)
    check_has_weights(model, len(model.weights))
    why_kept = {id(x): why for x, why in rewriter.walk(copy)}
    ours = [x for x in compat.sublayers(copy) if isinstance(x, QuantizableMixin)]
    layers = [x for x in ours if why_kept[id(x)] is None]
    chosen = [(layer, chosen_names(layer, config)) for layer in layers]
    chosen += [(layer, []) for layer in ours if why_kept[id(layer)] is not None]
    problems = mismatches(config, layers, chosen)
    weights, unfit = weights_with_methods(copy, chosen, config, method)
    raise_problems(model, problems + [str(x) for x in unfit if strict])
    failed = [(x.layer, f"{x.name}: {x.why}") for x in unfit]
    chosen, weights = _without(chosen, weights, {id(x.layer) for x in unfit})
    if batches is not None and not weights and not unfit:
        raise ValueError(
            f"batches are for methods; got method={method!r} and no rule with one that selects a "
            "weight. Pass method=jaxquant.methods.GPTQ(), say, or leave them out."
        )
    made = quantize_by_methods(copy, weights, batches, progress) if weights else {}
    rows, more = _quantize(chosen, config, made, None if made else progress)
    failed += more
    if strict or not rows:
        raise_problems(model, [f"{x.path or x.name}: {why}" for x, why in failed])
    why_left = {**why_kept, **{id(x): why for x, why in failed}}
    report = report_of(copy, rows, config, why_left, [v.path for v in model.weights])
    _own(copy, model)
    return copy, report


def _without(chosen: Chosen, weights: list[Weight], left: set[int]) -> tuple[Chosen, list[Weight]]:
    """What is quantized if the layers with these ids stay in float."""
    kept = [weight for weight in weights if id(weight.layer) not in left]
    return [(layer, [] if id(layer) in left else names) for layer, names in chosen], kept


def _quantize(
    chosen: Chosen,
    config: SchemeConfig,
    made: dict[int, dict[str, QTensor]],
    progress: Progress | bool | None,
) -> tuple[list[ReportRow], list[tuple[Any, str]]]:
    """Quantizes the chosen weights of each layer; returns their rows, and where that failed."""
    rows, failed, done = [], [], 0
    total = sum(len(names) for _, names in chosen)
    with progress_bar(progress, total) as tell:
        for layer, names in chosen:
            try:
                rows += quantize_layer(layer, names, config, made.get(id(layer)))
            except (NotImplementedError, ValueError) as error:
                failed.append((layer, str(error)))
            for name in names:
                done += 1
                tell(done, total, path_of(layer, name))
    return rows, failed


def quantize_layer(
    layer: Any, names: list[str], config: SchemeConfig, made: dict[str, QTensor] | None
) -> list[ReportRow]:
    """Quantizes weights of one layer; returns the rows of all that are quantized now."""
    before = {name: layer.float_weights[name].value for name in names}
    if made:
        take_over(layer, config, made)
    elif names:
        layer.quantize(config=config)
    return [_quantized(layer, name, before.get(name)) for name in layer.stored_weights]


def config_of(rules: Any) -> SchemeConfig:
    """The config for rules, a mode, or a config of Keras or jaxquant.keras.

    Raises:
        ValueError: `rules` is another mode or config.
    """
    is_config = isinstance(rules, keras.quantizers.QuantizationConfig)
    if is_config or isinstance(rules, str):
        config = as_config(None, rules)
        if isinstance(config, SchemeConfig):
            return config
        raise ValueError(
            "rules must be a Scheme, an ArrayConfig, rules by path, a config of jaxquant.keras, or "
            f"'int8', 'int4' or 'float8'; got {rules!r}{advice_for(rules)}."
        )
    return QuantizationConfig(rules)


def path_of(layer: Any, name: str) -> str:
    """The path of a layer's weight, which patterns of rules match."""
    return f"{layer.path or layer.name}/{name}"


def _scheme(layer: Any, name: str, config: SchemeConfig) -> Scheme | ArrayConfig | None:
    rule = config.rule_for(path_of(layer, name))
    return rule and rule.scheme


def chosen_names(layer: Any, config: SchemeConfig) -> list[str]:
    """Names of the float weights that a config selects."""
    names = [n for n in layer.declared_shapes if n not in layer.stored_weights]
    return [n for n in names if _scheme(layer, n, config) is not None]


def mismatches(config: SchemeConfig, layers: list[Any], chosen: Chosen) -> list[str]:
    """Problems that can be found without the values of the weights."""
    paths = [path_of(layer, name) for layer in layers for name in layer.declared_shapes]
    rules = config.rules if isinstance(config, QuantizationConfig) else ()
    unused = [r for r in rules if r.required and not any(r.matches(p, None) for p in paths)]
    problems = [f"rule {r.pattern!r} matches no quantizable weight" for r in unused]
    again = [
        f"{path_of(layer, name)} is already quantized, to {layer.quantized_weight(name)!r}; give "
        "it a rule with None, or quantize the float model"
        for layer in layers
        for name in layer.stored_weights
        if _scheme(layer, name, config) is not None
    ]
    if not problems and not again and not any(names for _, names in chosen):
        problems = ["the rules select no weight"]
    if problems:
        problems[-1] += f"; quantizable are {', '.join(paths[:8]) or 'none'}"
        problems[-1] += ", ..." if len(paths) > 8 else ""
    return problems + again


def report_of(
    model: Any,
    rows: list[ReportRow],
    config: SchemeConfig,
    why_left: dict[int, str | None],
    paths: list[str],
) -> Report:
    """The rows of quantized weights, and of all others, in the order of the paths of weights."""
    layers = compat.sublayers(model)
    left = [row for x in layers for row in _rows_left(x, config, why_left[id(x)])]
    places = {path: place for place, path in enumerate(paths)}
    found = sorted([*rows, *left], key=lambda row: places.get(row.path, len(places)))
    return Report(tuple(found))


def _rows_left(layer: Any, config: SchemeConfig, why_kept: str | None) -> list[ReportRow]:
    """A row for each of the layer's own weights that is not quantized."""
    is_quantizable = isinstance(layer, QuantizableMixin)
    stored = layer.stored_weights.values() if is_quantizable else ()
    floats = {id(v): n for n, v in layer.float_weights.items()} if is_quantizable else {}
    held = {id(v) for weight in stored for v in weight.variables}
    why = (
        "not declared quantizable"
        if is_quantizable
        else f"{type(layer).__name__} is not a quantizable layer"
    )
    rows = []
    for variable in compat.own_variables(layer):
        if id(variable) in held:
            continue
        name = floats.get(id(variable))
        reason = why if name is None else _reason(layer, name, config)
        row = report(None, {variable.path: variable.value}).rows[0]
        rows += [dataclasses.replace(row, reason=why_kept or reason)]
    return rows


def _reason(layer: Any, name: str, config: SchemeConfig) -> str:
    rule = config.rule_for(path_of(layer, name))
    if rule is None:
        return "no rule matches"
    stays = f"stays float, by {type(config).__name__}"
    return stays if rule.scheme is not None else rule.note or f"left by rule {rule.pattern!r}"


def _quantized(layer: Any, name: str, before: jax.Array | None) -> ReportRow:
    """The row of a quantized weight; `before` is its float value, if it has just been quantized."""
    stored, path = layer.stored_weights[name], path_of(layer, name)
    q, size = stored.on_host(), max(math.prod(stored.shape), 1)
    given = jax.ShapeDtypeStruct(q.shape, q.dtype) if before is None else before
    noise = None if before is None else layer.weight_state.noise.get(name)
    sqnr = None if noise is None else sqnr_of(1.0, noise**2)
    contracted = normalize_axes(layer.declared_weights[name].axes(layer), q.ndim)
    row = row_of(path, given, q, None, None, sqnr, histogram(q), contracted)
    bits = 8 * row.bytes_after / size
    return dataclasses.replace(row, shape=stored.shape, bits_per_weight=bits)


def _own(copy: keras.Model, model: keras.Model) -> None:
    """Copies the arrays that both models hold: training one model donates its arrays."""
    shared = {id(v.value) for v in model.variables}
    for variable in copy.variables:
        if id(variable.value) in shared:
            variable.assign(jnp.copy(variable.value))
