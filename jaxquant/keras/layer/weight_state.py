"""The state of a quantizable layer: its declared weights, in float or quantized."""

import contextlib
import re
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import keras

from ...core import QTensor, Scheme
from ...tree import Rule
from .. import compat
from ..configs import SchemeConfig
from .aliases import alias
from .quantize_rows import Noise, fits_rows, quantize_rows
from .weights import StoredWeight, abstract_tensor, fit_groups, quantize_padded


class LayerState:
    """The variables of one layer's declared weights.

    Attributes:
        layer: the layer.
        float_weights: variables by weight name; None for a weight that the layer omits.
        stored_weights: quantized weights by name.
        aliases: declared weights by the other attributes under which the layer keeps them.
        hook_variables: variables that build hooks created beside codes and scales.
        noise: by weight name, the norm of its quantization error, relative to that of the weight.
        is_building: whether the layer's `build` is running.
        models: models that have called the layer.
    """

    def __init__(self, layer: Any):
        self.layer = layer
        self.float_weights: dict[str, Any] = {}
        self.stored_weights: dict[str, StoredWeight] = {}
        self.aliases: dict[str, str] = {}
        self.hook_variables: tuple[keras.Variable, ...] = ()
        self.noise: dict[str, float] = {}
        self.is_building = False
        self.models: weakref.WeakSet[keras.Model] = weakref.WeakSet()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the declared weights that the layer has, quantized or not."""
        floats = self.float_weights.items()
        found = {name: tuple(v.shape) for name, v in floats if v is not None}
        found |= {name: weight.shape for name, weight in self.stored_weights.items()}
        return {name: found[name] for name in self.layer.declared_weights if name in found}

    def path(self, name: str) -> str:
        """The path of a weight, by which rules select it."""
        return f"{self.layer.path or self.layer.name}/{name}"

    # Quantizing by a config.

    def plan(self, name: str, config: SchemeConfig) -> tuple[tuple[int, ...], Scheme] | None:
        """The axes that share a scale, and the scheme, of a weight; None if it stays in float."""
        rule = config.rule_for(self.path(name))
        scheme = None if rule is None else rule.resolve()
        if rule is None or scheme is None or config.is_training:
            return None
        declared = self.layer.declared_weights[name]
        axis = declared.axes(self.layer) if rule.axis is None else rule.axis
        inputs = scheme.inputs if declared.inputs else None
        return axis if isinstance(axis, tuple) else (axis,), Scheme(scheme.weights, inputs)

    def like(self, name: str, shape: tuple[int, ...], config: SchemeConfig) -> QTensor:
        """Shapes and dtypes of a weight of this shape once it is quantized."""
        plan = self.plan(name, config)
        assert plan is not None, "asked for a weight that the config leaves in float"
        axes, scheme = plan
        array_config, axis, padded = fit_groups(shape, axes, scheme.weights)
        dtype, multiplier = self.layer.variable_dtype, config.multipliers.get(name)
        contracted = self._contracted(name, config)
        return abstract_tensor(
            padded, dtype, array_config, axis, scheme.inputs, multiplier, contracted
        )

    def _contracted(self, name: str, config: SchemeConfig) -> tuple[int, ...] | None:
        """The axes that products with a weight sum over, unless a rule names other axes."""
        rule = config.rule_for(self.path(name))
        is_declared = rule is None or rule.axis is None
        return self.layer.declared_weights[name].contracted(self.layer) if is_declared else None

    def tree_rule(self, name: str, config: SchemeConfig, path: str, method: Any) -> Rule | str:
        """The rule by which `tree.quantize` quantizes a weight at a path, or why none does."""
        plan, given = self.plan(name, config), config.rule_for(self.path(name))
        assert plan is not None, "asked for a weight that stays in float"
        assert given is not None, "asked for a weight that stays in float"
        (axes, scheme), shape = plan, self.shapes[name]
        weights, axis, padded = fit_groups(shape, axes, scheme.weights)
        chain = method if given.method is None else given.method
        if chain is not None and padded != shape:
            return (
                f"methods need groups that divide the axes that share a scale; got {shape} and "
                f"{scheme.weights}. Choose another group_size"
            )
        scheme = Scheme(weights, scheme.inputs)
        contracted = self._contracted(name, config)
        return Rule("re:" + re.escape(path), scheme, axis=axis, method=chain, contracted=contracted)

    def likes(self, config: SchemeConfig) -> dict[str, QTensor]:
        """Shapes and dtypes of the weights that a config quantizes, by name."""
        names = [name for name in self.shapes if self.plan(name, config) is not None]
        return {name: self.like(name, self.shapes[name], config) for name in names}

    def quantized_values(self, name: str, values: jax.Array, config: SchemeConfig) -> QTensor:
        """Quantizes values for a weight, and checks the result. See `QuantizableMixin`."""
        plan = self.plan(name, config)
        assert plan is not None, "asked for a weight that the config leaves in float"
        shape, (axes, scheme), path = tuple(values.shape), plan, self.path(name)
        like = self.like(name, shape, config)
        array_config, axis, padded = fit_groups(shape, axes, scheme.weights)
        if fits_rows(values, array_config, like):
            q, noise = quantize_rows(values, array_config, like)
        else:
            q, *sums = quantize_padded(values, array_config, axis, padded, like.order)
            noise = Noise(bool(sums[0]), float(sums[1]))
        if not noise.is_finite:
            raise ValueError(f"{path} holds NaN or Inf; got shape {shape}. Fix it, then quantize.")
        if not noise.relative < 1:  # Also true for NaN.
            raise ValueError(
                f"Quantizing {path} would lose its values: the error has {noise.relative:.3g} "
                f"times their norm. Got {array_config}; choose another range or scale_dtype."
            )
        self.noise[name] = noise.relative
        return q

    # Changing the layer.

    def build(self, mode: str, name: str, shape: tuple[int, ...]) -> None:
        """Calls the mode's build hook: as in Keras' guides if the layer has one weight.

        Raises:
            ValueError: the hook did not create the weight's variables.
        """
        layer = self.layer
        hook, known = getattr(layer, f"_{mode}_build"), compat.own_variables(layer)
        hook(shape) if len(layer.declared_weights) == 1 else hook(shape, name)
        if name not in self.stored_weights:
            raise ValueError(
                f"{type(layer).__name__}._{mode}_build must create the variables of {name!r}; got "
                f"{list(self.stored_weights)}. Call super()._{mode}_build in it."
            )
        held = {id(v) for v in (*known, *self.stored_weights[name].variables)}
        new = (v for v in compat.own_variables(layer) if id(v) not in held)
        self.hook_variables = (*self.hook_variables, *new)

    def assign(self, tensors: dict[str, QTensor]) -> None:
        """Overwrites quantized weights with others of the same shapes and formats.

        Raises:
            ValueError: one of them has another shape or format. Nothing is changed.
        """
        for name, q in tensors.items():
            stored = self.stored_weights.get(name)
            like = stored and stored.like
            if like is None or jax.eval_shape(_leaves, q) != jax.eval_shape(_leaves, like):
                raise ValueError(
                    f"{self.layer.name} is quantized in another way; got {name!r} as "
                    f"{_described(q)} for {_described(like)}. Load it into a float layer, or one "
                    "with the same config."
                )
        for name, q in tensors.items():
            self.stored_weights[name].assign(q)

    def drop_floats(self, names: Iterable[str]) -> None:
        """Drops the float variables of weights that are now quantized."""
        with compat.unlocked(self.layer):
            for name in names:
                variable = self.float_weights.pop(name)
                compat.drop_variable(self.layer, variable)
                alias(self.layer, variable, name)

    def copied_fields(self) -> dict[str, Any]:
        """The fields, with copies of the dicts among them, for `restore`."""
        return {k: dict(v) if isinstance(v, dict) else v for k, v in vars(self).items()}

    def restore(self, fields: dict[str, Any]) -> None:
        """Undoes changes since `copied_fields`."""
        vars(self).update(fields)

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Lets the layer create variables, and undoes every change if that raises."""
        layer = self.layer
        attributes, known = dict(layer.__dict__), compat.own_variables(layer)
        fields = self.copied_fields()
        with compat.unlocked(layer):
            try:
                yield
            except BaseException:
                self._drop_all_but(known)
                layer.__dict__.clear()
                layer.__dict__.update(attributes)
                self.restore(fields)
                raise

    def _drop_all_but(self, known):
        kept = {id(v) for v in known}
        for variable in compat.own_variables(self.layer):
            if id(variable) not in kept:
                compat.drop_variable(self.layer, variable)

    def check_present(self) -> None:
        """Checks that the layer has created a weight that it declares, or set all to None.

        Raises:
            ValueError: it has none.
        """
        declared = list(self.layer.declared_weights)
        if not self.float_weights and not self.stored_weights:
            found = [v.name for v in compat.own_variables(self.layer)]
            raise ValueError(
                f"{type(self.layer).__name__} declares {declared} and creates none of them; got "
                f"the variables {found}. Create each by self.add_weight under its declared name, "
                f"such as `self.{declared[0]} = self.add_weight(name={declared[0]!r}, ...)`."
            )


def _leaves(q):
    return jax.tree.leaves(q)


def _described(q):
    shift = "" if q is None or q.zero_point is None else ", with zero points"
    return f"{q!r}{shift}"
