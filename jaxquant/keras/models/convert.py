"""Converts models from stock Keras layers to those of jaxquant, and back."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import keras
import numpy as np

from ...core import INT4, INT8, AbsMax, QTensor, blocks_between, check_flags, scale_values
from .. import compat, layers
from ..files import other_variables, repeat_groups
from ..layer import QuantizableMixin
from .checks import Keep, as_keep, check_is_layer
from .composite import (
    COUNTERPARTS,
    SHARE_WEIGHTS,
    CompositeMixin,
    in_float,
    is_stock,
    original_class,
    stock_base,
)
from .rewrite import ModelRewriter
from .state import copy_variables


def convert(model: keras.Model, *, keep: Keep = (), strict: bool = True) -> Any:
    """Copies a model of stock layers into one of `jaxquant.keras.layers`.

    The copy has the same outputs bit for bit, and the same names, trainable flags, weights and
    other state. It is not compiled. Layers without a quantizable counterpart, such as
    normalization, stay stock layers; quantizable layers are copied as they are. The given model
    is not changed.

    Custom layers, subclassed models and those of libraries such as KerasHub are made again from
    their config. The stock layers that their code creates become quantizable in the copy, and so
    do layers that multiply with their own weights: their call is lifted, as by `jaxquant.lift`.
    The class of such a copy is a subclass of the original's, under its name, and can be saved.

    Args:
        model: of any class, with nested models, shared layers and wrappers. A functional model
            whose class defines its own constructor, and cannot be made from its config, becomes
            a keras.Model or keras.Sequential.
        keep: names and classes of layers to copy as they are.
        strict: False copies custom layers as they are whose call cannot be lifted, and lets the
            copy share layers with the model that cannot be made from their config.

    Raises:
        ValueError: lists what cannot be converted: custom layers that multiply with weights of
            their own and cannot be lifted, because they keep them in a container, two under one
            name, or cannot be traced; layers that stock Keras has quantized, that are not built,
            or that cannot be made from their config; entries of `keep` that match no layer. Or
            `strict` is neither True nor False.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> type(jk.convert(model).layers[0]) is jk.layers.Dense
        True
    """
    return converter(keep, strict).copy(model)


def to_stock(model: keras.Model, *, dequantize: bool = False, keep: Keep = ()) -> Any:
    """Copies a model of jaxquant layers into one of stock Keras layers, for use without jaxquant.

    Float layers become stock float layers. 8-bit Dense, EinsumDense and Embedding layers, and
    4-bit ones from Keras 3.14 on, become layers quantized by Keras, with the same codes: outputs
    are equal up to rounding. The given model is not changed.

    Args:
        model: as for `convert`.
        dequantize: whether layers that stock Keras cannot quantize in this way become float
            layers, with dequantized weights.
        keep: names and classes of layers to copy as they are.

    Raises:
        ValueError: lists what cannot be converted: such layers without `dequantize`, custom
            quantizable layers, and what `convert` does not support.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), jk.layers.Dense(2)])
        >>> model.quantize("int8")
        >>> stock = jk.to_stock(model)
        >>> type(stock.layers[0]) is keras.layers.Dense, stock.layers[0].quantization_mode
        (True, 'int8')
    """
    check_flags(dequantize=dequantize)
    check_is_layer(model)
    wrappers = [x for x in compat.sublayers(model) if isinstance(x, keras.layers.TimeDistributed)]
    form = functools.partial(_stock_form, wrapped={id(x.layer) for x in wrappers})

    def why_unsupported(layer: Any) -> str | None:
        found = None if dequantize else form(layer)
        return _why_no_stock_class(layer) or (found if isinstance(found, str) else None)

    rewriter = ModelRewriter(stock_class, why_unsupported, prepare=in_float, keep=as_keep(keep))
    return rewriter.copy(model, functools.partial(_fill_stock, form))


def converter(keep: Keep, strict: bool = True) -> ModelRewriter:
    """The rewriter from stock layers to quantizable ones."""
    check_flags(strict=strict)
    return ModelRewriter(
        COUNTERPARTS.get,
        _why_unsupported,
        _why_not_quantizable,
        replaces_inside=True,
        keep=as_keep(keep),
        always_keep=SHARE_WEIGHTS,
        strict=strict,
    )


def stock_class(cls: type) -> type | None:
    """The stock layer that replaces exactly this quantizable class, or None."""
    return stock_base(cls) if cls in COUNTERPARTS.values() else None


def _why_unsupported(layer: Any) -> str | None:
    """Why a layer cannot be part of a converted model, or None."""
    if getattr(layer, "lora_enabled", False):
        return (
            f"{original_class(type(layer)).__name__} has LoRA enabled; convert or quantize the "
            "model before enable_lora, or save and load the float model, which merges LoRA"
        )
    if isinstance(layer, QuantizableMixin) or layer.quantization_mode is None:
        return None
    return (
        f"{type(layer).__name__} is quantized to {layer.quantization_mode} by stock Keras; convert "
        "the float model and quantize that"
    )


def _why_not_quantizable(layer: Any, reason: str) -> str | None:
    """The problem with a layer whose call cannot be lifted; None if it needs no lifting."""
    cls = original_class(type(layer))
    if isinstance(layer, QuantizableMixin) or is_stock(cls) or not compat.own_variables(layer):
        return None
    stock = next((base for base in cls.__mro__ if base in COUNTERPARTS), None)
    base = f"jaxquant.keras.layers.{stock.__name__}" if stock else "jaxquant.keras.QuantizableMixin"
    return (
        f"{cls.__name__} holds weights and is not quantizable: {reason}; derive it from {base}, "
        f"or pass keep=[{layer.name!r}], or strict=False to leave all such layers in float"
    )


# Stock forms of quantizable layers.


def _why_no_stock_class(layer: Any) -> str | None:
    """Why a quantizable layer has no stock counterpart, or None."""
    is_ours = isinstance(layer, QuantizableMixin) and not isinstance(layer, CompositeMixin)
    if not is_ours or stock_class(type(layer)) is not None:
        return None
    return (
        f"{type(layer).__name__} is a quantizable layer that Keras does not have; pass "
        f"keep=[{layer.name!r}], and its users need jaxquant"
    )


def _fill_stock(form: Callable[[Any], Any], old: Any, new: Any) -> None:
    """Copies a layer's own weights to its stock copy, as codes or in float."""
    found = form(old)
    if found is None:
        copy_variables(old, new)
    elif isinstance(found, str):
        _dequantize(old, new)
    else:
        new.quantize(config=found.config)
        entries = [found.codes, *other_variables(old, old.declared_weights), *found.rest]
        new.load_own_variables({str(i): x for i, x in enumerate(entries)})


def _dequantize(old: Any, new: Any) -> None:
    values = {v.name: v.value for v in compat.own_variables(old)}
    values |= {name: old.stored_weights[name].dequantize() for name in old.stored_weights}
    for variable in compat.own_variables(new):
        variable.assign(jnp.copy(values[variable.name]))
    for source, target in zip(compat.seeds(old), compat.seeds(new), strict=True):
        target.assign(jnp.copy(source.value))


class _StockForm(NamedTuple):
    """A quantized weight of a stock layer: the entries of its file, and its config."""

    config: Any
    codes: Any
    rest: list[Any]


def _stock_form(layer: Any, wrapped: set[int]) -> _StockForm | str | None:
    """The stock form of the layer's quantized weight, or why none exists; None for float layers."""
    if not isinstance(layer, QuantizableMixin) or not layer.stored_weights:
        return None
    name, *others = layer.stored_weights
    q = layer.tensor_to_save(name).reorder(None)
    is_plain = q.offset is None and not (q.inputs and q.inputs.changes_weight)
    is_known = type(layer) in _WITH_FORMS and not others and is_plain
    form = _FORMS.get(q.format) if is_known else None
    found = form(layer, name, q) if form else "Keras does not have the mode for this layer"
    if id(layer) in wrapped:
        found = "stock TimeDistributed uses the codes of its layer as weights"
    is_form = isinstance(found, _StockForm)
    advice = "pass dequantize=True to get a float layer"
    return found if is_form else f"{type(layer).__name__} with {q!r}: {found}; {advice}"


def _int8_form(layer: Any, name: str, q: QTensor) -> _StockForm | str:
    shared = {a % q.ndim for a in layer.declared_weights[name].axes(layer)}
    quantizer = _stock_inputs(q)
    if any(q.scale.shape[a] > 1 for a in shared) or q.zero_point is not None:
        return "stock int8 needs one scale per channel, and no zero point"
    if isinstance(quantizer, str):
        return quantizer
    full = [1 if a in shared else n for a, n in enumerate(q.shape)]
    q = dataclasses.replace(q, scale=jnp.broadcast_to(scale_values(q.scale), full))
    scale = layer.scale_to_stock(name, 1 / np.asarray(q.scale, np.float64), q)
    make_config: Any = keras.quantizers.Int8QuantizationConfig
    config = make_config(activation_quantizer=quantizer)
    return _StockForm(config, q.codes, [scale])


def _int4_form(layer: Any, name: str, q: QTensor) -> _StockForm | str:
    make_config: Any = keras.quantizers.Int4QuantizationConfig
    if "block_size" not in inspect.signature(make_config).parameters:
        return f"stock int4 of Keras {keras.__version__} packs another axis; update to 3.14"
    shape = layer.stored_weights[name].shape
    matrix = layer.stock_matrix(name, shape)
    zero = jnp.zeros_like(q.scale, jnp.int8) if q.zero_point is None else q.zero_point
    parts = [np.asarray(x.astype(jnp.float32)) for x in (q.codes, q.scale, zero)]
    inside = tuple(slice(n) for n in shape)
    codes, step, zero = (repeat_groups(x, q.shape)[inside].reshape(matrix.shape) for x in parts)
    rows = np.arange(matrix.shape[matrix.axis])
    blocks = blocks_between(q.shape, q.scale.shape)
    size = min(math.prod(blocks[a] for a in layer.declared_weights[name].axes(layer)), len(rows))
    group, firsts = rows // size, rows[::size]
    parts = [np.take(x, firsts, matrix.axis) for x in (step, zero)]
    again = [np.take(x, group, matrix.axis) for x in parts]
    if not all(np.array_equal(x, y) for x, y in zip(again, (step, zero), strict=True)):
        return f"stock int4 has groups of rows of the matrix {matrix.shape}, which are not these"
    packed = keras.quantizers.pack_int4(codes.astype(np.int8), axis=-1)[0]
    quantizer = _stock_inputs(q)
    if isinstance(quantizer, str):
        return quantizer
    if len(firsts) == 1 and q.zero_point is None:
        config = make_config(block_size=None, activation_quantizer=quantizer)
        return _StockForm(config, packed, [1 / np.squeeze(parts[0], matrix.axis)])
    if quantizer is not None:
        return "stock int4 in groups does not quantize activations"
    rest = [parts[0], parts[1].astype(np.int8), group.astype(np.float32)]
    return _StockForm(make_config(block_size=size), packed, rest)


def _stock_inputs(q: QTensor) -> Any:
    """The stock quantizer of the activations, or why there is none; None for float activations."""
    inputs = q.inputs
    if inputs is None or inputs.config is None:
        return None
    config = inputs.config
    is_plain = config.format == INT8 and config.range == AbsMax() and config.symmetric
    is_calibrated = inputs.scale is not None or inputs.changes_weight
    if not is_plain or is_calibrated or config.group_size is not None or config.per_tensor:
        return f"stock layers quantize activations to int8 by abs-max only, not by {config}"
    low, high = config.value_range or (-127, 127)
    return keras.quantizers.AbsMaxQuantizer(axis=-1, value_range=(low, high))


_WITH_FORMS = (layers.Dense, layers.EinsumDense, layers.Embedding)
_FORMS = {INT8: _int8_form, INT4: _int4_form}
