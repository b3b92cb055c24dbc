"""Configs for `quantize(config=...)`: versions of Keras' configs, and rules by path."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import keras

from ..core import (
    FP8,
    INT4,
    INT8,
    W4A16_ASYM,
    W8A8,
    ArrayConfig,
    Format,
    Scheme,
    check_flags,
    config_from_json,
    config_to_json,
)
from ..tree import Rule, Rules
from ..tree.internal import as_rules
from .bases import KerasQuantizationConfig
from .quantizers import AbsMaxQuantizer, as_array_config

_register = keras.saving.register_keras_serializable(package="jaxquant")


# In place of a quantizer.
_DEFAULT = "default"


def mode_of(format: Format) -> str:
    """The Keras mode for codes of a format."""
    if format.bits < 8:
        return "int4"
    return "int8" if format.rounds else "float8"


class SchemeConfig(KerasQuantizationConfig):
    """A Keras config that gives each weight its scheme. Base class of the configs here."""

    is_training = False
    multipliers: Mapping[str, tuple[int, ...]] = MappingProxyType({})

    def __init__(self, weight_quantizer: Any = None, activation_quantizer: Any = None):
        # Not those of Keras' subclasses, which have other defaults.
        self.weight_quantizer = weight_quantizer
        self.activation_quantizer = activation_quantizer

    def rule_for(self, path: str) -> Rule | None:
        """The rule for the weight at a path such as "dense/kernel"; None leaves it in float."""
        raise NotImplementedError(f"{type(self).__name__} must define rule_for.")

    def for_weights(self, paths: dict[str, str]) -> "SchemeConfig":
        """The config of one layer, from the paths of its weights by name."""
        return self

    def _scheme(self, default: Scheme, format: Format, group_size: int | None) -> Scheme:
        """The default scheme, with the given quantizers in place of its configs."""
        weights, inputs = default.weights, None
        if self.weight_quantizer is not None:
            weights = as_array_config(self.weight_quantizer, format)
        if self.activation_quantizer is not None:
            inputs = as_array_config(self.activation_quantizer, INT8)
        return Scheme(dataclasses.replace(weights, group_size=group_size), inputs)


class _OneRule(SchemeConfig):
    """A config that quantizes every weight by `self.rule`."""

    rule: Rule
    keras_mode: ClassVar[str]

    @property
    def mode(self) -> str:
        """The Keras mode."""
        return self.keras_mode

    def rule_for(self, path: str) -> Rule | None:
        """The same rule for every weight."""
        return self.rule


@_register
class Int8QuantizationConfig(_OneRule, keras.quantizers.Int8QuantizationConfig):
    """int8 weights with one scale per output channel, int8 activations with one scale per row.

    Args:
        weight_quantizer: a Keras quantizer for the weights, which is used along the axes that the
            layer declares; None for abs-max.
        activation_quantizer: one for the activations; "default" for abs-max, None to leave them
            in float (weight-only).

    Example:
        >>> config = jk.Int8QuantizationConfig(jk.AbsMaxQuantizer(value_range=(-100, 100)))
        >>> layer = jk.layers.Dense(4)
        >>> layer.build((None, 8))
        >>> layer.quantize(config=config)
        >>> int(abs(layer.quantized_weight("kernel").codes).max())
        100
    """

    keras_mode = "int8"

    def __init__(self, weight_quantizer: Any = None, activation_quantizer: Any = _DEFAULT):
        super().__init__(weight_quantizer, _or_default(activation_quantizer, AbsMaxQuantizer()))
        self.rule = Rule("*", self._scheme(W8A8, INT8, None))


@_register
class Int4QuantizationConfig(_OneRule, keras.quantizers.Int4QuantizationConfig):
    """int4 weights with one scale per group, activations in float (weight-only).

    By default groups are asymmetric. With one scale per channel they are symmetric.

    Args:
        weight_quantizer: a Keras quantizer for the weights, with a value range within (-8, 7);
            None for abs-max.
        activation_quantizer: one for int8 activations; "default" and None leave them in float.
        block_size: the largest number of elements per scale along the contracted axes. An axis
            that it does not divide is padded. None or -1 for one scale per output channel.

    Example:
        >>> layer = jk.layers.Dense(4)
        >>> layer.build((None, 64))
        >>> layer.quantize(config=jk.Int4QuantizationConfig(block_size=32))
        >>> layer.quantized_weight("kernel").reorder(None).scale.shape
        (2, 4)
    """

    keras_mode = "int4"

    def __init__(
        self,
        weight_quantizer: Any = None,
        activation_quantizer: Any = _DEFAULT,
        block_size: int | None = 128,
    ):
        super().__init__(weight_quantizer, _or_default(activation_quantizer, None))
        is_integer = isinstance(block_size, int) and not isinstance(block_size, bool)
        if block_size is not None and not (is_integer and (block_size > 0 or block_size == -1)):
            raise ValueError(
                "block_size must be a positive int, or None or -1 for one scale per output "
                f"channel; got {block_size!r}."
            )
        self.block_size = block_size
        group_size = None if block_size == -1 else block_size
        default = W4A16_ASYM if group_size else Scheme(ArrayConfig(format=INT4))
        self.rule = Rule("*", self._scheme(default, INT4, group_size))

    def get_config(self) -> dict[str, Any]:
        """The arguments, for Keras' serialization."""
        return {**super().get_config(), "block_size": self.block_size}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Int4QuantizationConfig":
        """Undoes `get_config`."""
        return cls(**keras.saving.deserialize_keras_object(config))


@_register
class Float8QuantizationConfig(_OneRule, keras.quantizers.Float8QuantizationConfig):
    """float8 (e4m3) weights with one scale per output channel, activations with one per row.

    Args:
        training: False stores float8 weights and scales the activations dynamically. True keeps
            float weights and trains: both operands are rounded to e4m3 and gradients to e5m2,
            with delayed scaling.

    Example:
        >>> layer = jk.layers.Dense(4)
        >>> layer.build((None, 8))
        >>> layer.quantize(config=jk.Float8QuantizationConfig())
        >>> layer.quantized_weight("kernel").codes.dtype.name
        'float8_e4m3fn'

    Source: Micikevicius et al. 2022, arXiv:2209.05433.
    """

    keras_mode = "float8"

    def __init__(self, training: bool = False):
        super().__init__(None, None)
        check_flags(training=training)
        self.is_training = training
        self.rule = Rule("*", FP8)

    def get_config(self) -> dict[str, Any]:
        """The arguments, for Keras' serialization."""
        return {"training": self.is_training}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Float8QuantizationConfig":
        """Undoes `get_config`."""
        return cls(**config)


# The name in files, which earlier versions also wrote.
@keras.saving.register_keras_serializable(package="jaxquant", name="Config")
class QuantizationConfig(SchemeConfig):
    """Selects a scheme for each weight by its path.

    Args:
        rules: a Scheme or ArrayConfig for all quantizable weights; or a dict of pattern to
            scheme, a Rule or a sequence of them. The first one that matches a weight's path, such
            as "encoder/dense/kernel", applies; other weights stay in float. Begin patterns with
            "*": Keras puts the name of a Sequential before those of its layers. Axes are those
            that the layer declares, unless a Rule names others.
        multipliers: shapes of the multipliers of activations that a layer stores beside its
            weights, by their name. `jaxquant.keras.quantize` sets them for methods such as AWQ.

    Raises:
        ValueError: a rule has a `where` or a range that a file cannot hold, or as for `Rule`.

    Example:
        >>> config = jk.QuantizationConfig({"*/attention/*": jq.NF4A16, "*": jq.W8A8})
        >>> config.rule_for("encoder/dense/kernel").pattern
        '*'
    """

    def __init__(self, rules: Rules, multipliers: Mapping[str, Sequence[int]] | None = None):
        super().__init__(None, None)
        self.multipliers = {name: tuple(shape) for name, shape in (multipliers or {}).items()}
        is_one = isinstance(rules, Scheme | ArrayConfig)
        self.rules = (Rule("*", rules),) if is_one else as_rules(rules)
        odd = [rule.pattern for rule in self.rules if rule.where is not None]
        if odd:
            raise ValueError(
                "Rules of a QuantizationConfig must go by path alone; got a `where` in "
                f"{odd}. Write patterns."
            )
        self.get_config()  # Raises now, not when the model is saved.

    @property
    def mode(self) -> str:
        """The Keras mode of the first scheme. It is only a name: the rules determine the result."""
        schemes = [s for s in (rule.resolve() for rule in self.rules) if s is not None]
        return mode_of(schemes[0].weights.format if schemes else INT8)

    def rule_for(self, path: str) -> Rule | None:
        """The first rule that matches."""
        return next((rule for rule in self.rules if rule.matches(path, None)), None)

    def for_weights(self, paths: dict[str, str]) -> "QuantizationConfig":
        """Rules for these weights only, which apply wherever the layer is loaded."""
        found = {name: self.rule_for(path) for name, path in paths.items()}
        rules = [
            dataclasses.replace(rule, pattern=f"*/{name}", required=False)
            for name, rule in found.items()
            if rule is not None
        ]
        return QuantizationConfig(rules or [Rule("*", None)], self.multipliers)

    def get_config(self) -> dict[str, Any]:
        """The rules as JSON values, for Keras' serialization."""
        rules = {"rules": [_rule_to_json(rule) for rule in self.rules]}
        return {**rules, "multipliers": self.multipliers} if self.multipliers else rules

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QuantizationConfig":
        """Undoes `get_config`."""
        rules = [_rule_from_json(row) for row in config["rules"]]
        return cls(rules, config.get("multipliers"))


def as_config(mode: str | None, config: Any) -> Any:
    """The SchemeConfig for the arguments of `quantize`, with the same defaults in every Keras.

    A config of another kind is returned unchanged; Keras checks it.
    """
    # `quantize(config="int8")` is Keras' older spelling of the mode.
    mode = config if isinstance(config, str) else mode
    if config is None or isinstance(config, str):
        return _DEFAULTS[mode]() if mode in _DEFAULTS else None
    kind = next((kind for kind in _STOCK if isinstance(config, kind)), None)
    if kind is None or isinstance(config, SchemeConfig):
        return config
    if config.get_config() == kind().get_config():
        # `model.quantize("int4")` passes this config, which stands for the default here.
        return _DEFAULTS[config.mode]()
    return _STOCK[kind](config)


def config_of_policy(policy: Any) -> Any:
    """The config for a quantized dtype policy; "int4/32_from_float32" has block size 32.

    Raises:
        NotImplementedError: its mode is not supported.
    """
    block_size = getattr(policy, "block_size", None)
    if block_size is not None:
        return Int4QuantizationConfig(block_size=block_size)
    config = as_config(policy.quantization_mode, None)
    if config is None:
        raise NotImplementedError(
            f"A layer can be created with a policy of {', '.join(_DEFAULTS)}; got "
            f"{policy.name!r}. Create it in float, then quantize it."
        )
    return config


_DEFAULTS = {
    "int8": Int8QuantizationConfig,
    "int4": Int4QuantizationConfig,
    "float8": Float8QuantizationConfig,
}
# The int4 of Keras 3.13 is per channel, without a block size.
_STOCK = {
    keras.quantizers.Int8QuantizationConfig: lambda c: Int8QuantizationConfig(
        c.weight_quantizer, c.activation_quantizer
    ),
    keras.quantizers.Int4QuantizationConfig: lambda c: Int4QuantizationConfig(
        c.weight_quantizer, c.activation_quantizer, getattr(c, "block_size", None)
    ),
    keras.quantizers.Float8QuantizationConfig: lambda c: Float8QuantizationConfig(),
}


def _or_default(quantizer: Any, default: Any) -> Any:
    """The quantizer, or the default for "default"."""
    if not isinstance(quantizer, str):
        return quantizer
    if quantizer != _DEFAULT:
        raise ValueError(
            f"activation_quantizer must be a quantizer, {_DEFAULT!r} or None; got {quantizer!r}."
        )
    return default


def _rule_to_json(rule: Rule) -> dict[str, Any]:
    scheme = rule.scheme
    if isinstance(scheme, ArrayConfig):
        scheme = Scheme(scheme)
    # The codes are in the file, and say nothing of the method that chose them.
    names = [f.name for f in dataclasses.fields(rule) if f.name not in ("where", "method")]
    row = {name: getattr(rule, name) for name in names}
    if scheme is not None:
        inputs = None if scheme.inputs is None else config_to_json(scheme.inputs)
        row["scheme"] = {"weights": config_to_json(scheme.weights), "inputs": inputs}
    return row


def _rule_from_json(row: dict[str, Any]) -> Rule:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    scheme = fields["scheme"]
    if scheme is not None:
        inputs = scheme["inputs"] and config_from_json(scheme["inputs"])
        fields["scheme"] = Scheme(config_from_json(scheme["weights"]), inputs)
    return Rule(**fields)
