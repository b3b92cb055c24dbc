"""The mixin that makes a Keras layer quantizable, with the hooks that Keras calls."""

import math
from typing import Any, ClassVar

import jax
import keras
import numpy as np

from ...core import QTensor
from .. import compat, files
from ..configs import SchemeConfig, as_config, config_of_policy
from . import optimizer_slots
from .aliases import AliasMixin, check_reachable
from .policy import PolicyMixin
from .weight_state import LayerState
from .weights import QuantizedWeight, StoredWeight, store_weight
from .wrappers import build_in_float, own_policy, quantize_with_config


class QuantizableMixin(AliasMixin, PolicyMixin):
    """Makes a Keras layer quantizable. Comes before the Keras layer among the bases.

    Write the layer for float weights, and declare which of them can be quantized. In a quantized
    layer `self.kernel` is the dequantized array, so `call` is right in every mode. To compute on
    codes, pass `self.operand("kernel")` to `jaxquant.matmul` or another operation.

    Any hook can be overridden by name, as in Keras' guides: `_int8_build(shape)` creates the
    variables and `_int8_call(...)` computes, likewise for int4 and float8. If a layer declares
    several weights, the build hooks also get the weight's name.

    Variables are saved in one order: the codes of the declared weights, in the order of their
    declaration; the layer's other variables, those of hooks last; the scales and zero points of
    each declared weight.

    Example:
        >>> class Scale(jk.QuantizableMixin, keras.layers.Layer):
        ...     kernel = jk.QuantizedWeight(axis=0)
        ...
        ...     def build(self, input_shape):
        ...         self.kernel = self.add_weight(name="kernel", shape=(input_shape[-1],))
        ...
        ...     def call(self, inputs):
        ...         return inputs * self.kernel
        >>> layer = Scale()
        >>> layer.build((None, 8))
        >>> layer.quantize("int8")
        >>> layer.quantized_weight("kernel").codes.dtype
        dtype('int8')
    """

    declared_weights: ClassVar[dict[str, QuantizedWeight]] = {}
    quantization_config: Any = None
    weight_state: LayerState

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        declared = {}
        for base in reversed(cls.__mro__):
            own = vars(base).items()
            declared |= {k: v for k, v in own if isinstance(v, QuantizedWeight)}
        cls.declared_weights = declared
        inherited = getattr(super(), "get_config", None)
        if cls.get_config is QuantizableMixin.get_config and inherited is not None:
            cls.get_config = compat.with_default_mark(QuantizableMixin.get_config, inherited)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        layer = super().__new__(cls, *args, **kwargs)
        # Not by setattr: Keras would track the variables in the state a second time.
        layer.__dict__["weight_state"] = LayerState(layer)
        layer.__dict__["build"] = build_in_float(layer, layer.build)
        layer.__dict__["quantize"] = quantize_with_config(layer)
        return layer

    # Reading declared weights.

    @property
    def float_weights(self) -> dict[str, Any]:
        """Float variables of the declared weights by name; None for an omitted one."""
        return self.weight_state.float_weights

    @property
    def stored_weights(self) -> dict[str, StoredWeight]:
        """Quantized weights by name."""
        return self.weight_state.stored_weights

    @property
    def declared_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the declared weights that the layer has, quantized or not."""
        return self.weight_state.shapes

    def quantized_weight(self, name: str) -> QTensor:
        """The weight as codes and scales, in the shape of its codes.

        Raises:
            ValueError: the weight is not quantized.
        """
        if name not in self.stored_weights:
            raise ValueError(
                f"{self.name} has no quantized weight {name!r}; got {list(self.stored_weights)}. "
                "Quantize the layer first."
            )
        return self.stored_weights[name].tensor()

    def has_codes(self, name: str) -> bool:
        """Whether `operand` returns codes: the weight is quantized and not padded."""
        stored = self.stored_weights.get(name)
        return stored is not None and not stored.is_padded

    def operand(self, name: str) -> QTensor | jax.Array:
        """The weight as an operand: a QTensor, or an array where `has_codes` is False.

        The QTensor's `inputs` determine how the other operand is quantized.
        """
        if name in self.stored_weights:
            return self.stored_weights[name].operand(self.compute_dtype)
        return jax.numpy.asarray(self.float_weights[name].value)

    def adapted(self, name: str, value: Any) -> Any:
        """Hook: what reading a weight's attribute returns, for example with LoRA added."""
        return value

    @property
    def inputs_quantizer(self) -> Any:
        """The Keras quantizer of the activations, or None."""
        return self.quantization_config and self.quantization_config.activation_quantizer

    # Building: under a quantized policy, `add_weight` creates codes in place of float weights.

    @property
    def quantization_mode(self) -> str | None:
        """The quantization mode; None while building, so that `build` takes its float path."""
        return None if self.weight_state.is_building else super().quantization_mode

    def add_weight(self, *args: Any, name: str | None = None, **kwargs: Any) -> Any:
        """Creates a variable; for a declared weight of a quantized layer, codes and scales."""
        if name not in self.declared_weights:
            return super().add_weight(*args, name=name, **kwargs)
        config = self._config_for_building() if self.weight_state.is_building else None
        if config is None or self.weight_state.plan(name, config) is None:
            self.float_weights[name] = super().add_weight(*args, name=name, **kwargs)
            return self.float_weights[name]
        self.weight_state.build(config.mode, name, tuple(args[0] if args else kwargs["shape"]))
        compat.mark_quantized(self)
        return self.stored_weights[name].codes

    def _config_for_building(self):
        """The config of a layer whose policy is quantized before it is built."""
        mode = super().quantization_mode
        if mode is not None:
            given = self.quantization_config
            config = config_of_policy(own_policy(self)) if given is None else given
            self.quantization_config = as_config(mode, config)
        return mode and self.quantization_config

    def _int8_build(self, shape: tuple[int, ...], name: str | None = None):
        """Hook: creates the variables of a weight of this shape, the only one or that named."""
        name = name or next(iter(self.declared_weights))
        like = self.weight_state.like(name, shape, self.quantization_config)
        self.stored_weights[name] = store_weight(super().add_weight, name, shape, like)

    def _int4_build(self, shape: tuple[int, ...], name: str | None = None):
        """Hook: see `_int8_build`."""
        QuantizableMixin._int8_build(self, shape, name)

    def _float8_build(self, shape: tuple[int, ...], name: str | None = None):
        """Hook: see `_int8_build`."""
        QuantizableMixin._int8_build(self, shape, name)

    # Calling.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer, and records the model that contains it."""
        optimizer_slots.note_model(self.weight_state.models)
        return super().__call__(*args, **kwargs)

    def quantized_call(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the hook of the mode."""
        return compat.call_hook(self)(*args, **kwargs)

    def _int8_call(self, *args: Any, **kwargs: Any):
        """Hook: the forward pass in this mode."""
        return self.call(*args, **kwargs)

    def _int4_call(self, *args: Any, **kwargs: Any):
        """Hook: the forward pass in this mode."""
        return self.call(*args, **kwargs)

    def _float8_call(self, *args: Any, **kwargs: Any):
        """Hook: the forward pass in this mode."""
        return self.call(*args, **kwargs)

    # Quantizing: every weight is computed and checked before anything changes.

    def quantize(
        self, mode: str | None = None, config: Any = None, type_check: bool = True
    ) -> None:
        """Quantizes the declared weights in place, all of them or none.

        Args:
            mode: "int8", "int4" or "float8", with its default config.
            config: in place of the mode: a config of `jaxquant.keras`, or of Keras.
            type_check: an argument of Keras, without effect: subclasses are quantized too.

        Raises:
            NotImplementedError: the layer cannot be quantized in this mode.
            ValueError: the layer is not built or already quantized; the mode is unknown; the
                layer created no declared weight, or keeps the variable of one in a list, a dict
                or a sublayer; a weight holds NaN or Inf, or its quantization error is as large
                as the weight. The layer is unchanged.
        """
        if not isinstance(config, SchemeConfig):
            raise NotImplementedError(
                f"{type(self).__name__} can be quantized to int8, int4 and float8; got "
                f"mode={mode!r} and config={config!r}. Pass one of these modes, or a config of "
                "jaxquant.keras."
            )
        if not self.declared_weights:
            raise NotImplementedError(
                f"{type(self).__name__} declares no weight to quantize; got {self.name!r}. Write "
                "`kernel = QuantizedWeight(axis=0)` in the class."
            )
        self.weight_state.check_present()
        if config.is_training:
            return self.start_training(config)
        names = [n for n in self.declared_weights if self.float_weights.get(n) is not None]
        config = config.for_weights({name: self.weight_state.path(name) for name in names})
        chosen = [name for name in names if self.weight_state.plan(name, config) is not None]
        values = {name: self.float_weights[name].value for name in chosen}
        if chosen:
            tensors = {n: self.quantized_values(n, x, config) for n, x in values.items()}
            self.take_over(config, tensors)

    def check_quantization(self, config: SchemeConfig) -> None:
        """Raises what `quantize` would, and changes nothing.

        Raises:
            ValueError: as for `quantize`.
        """
        if not self.declared_weights:
            return
        self.weight_state.check_present()
        if config.is_training:
            return self.check_training()
        for name in self.likes(config):
            variable = self.float_weights.get(name)
            if variable is not None:
                check_reachable(self, name, variable)
                self.quantized_values(name, variable.value, config)

    def quantized_values(self, name: str, values: jax.Array, config: SchemeConfig) -> QTensor:
        """Quantizes values for a declared weight, as `config` says.

        Raises:
            ValueError: they hold NaN or Inf, or the error is as large as the values.
        """
        return self.weight_state.quantized_values(name, values, config)

    def likes(self, config: SchemeConfig) -> dict[str, QTensor]:
        """Shapes and dtypes of the weights that a config quantizes, by name."""
        return self.weight_state.likes(config)

    def take_over(self, config: SchemeConfig, tensors: dict[str, QTensor]) -> None:
        """Replaces float weights by quantized ones, all of them or none.

        Args:
            config: the config that they were quantized with.
            tensors: weights by name, in the shapes and orders that `config` gives them.

        Raises:
            ValueError: the layer is already quantized in another way, or it keeps the variable of
                a weight where it would still be read.
        """
        state = self.weight_state
        if state.stored_weights:
            return state.assign(tensors)
        for name in tensors:
            check_reachable(self, name, state.float_weights[name])
        with state.all_or_nothing():
            self.quantization_config = config
            for name, q in tensors.items():
                state.build(config.mode, name, tuple(state.float_weights[name].shape))
                state.stored_weights[name].assign(q)
        floats = [state.float_weights[name] for name in tensors]
        state.drop_floats(tensors)
        self.switch_policy(config)
        optimizer_slots.renew_optimizers(state.models, floats)

    def switch_policy(self, config: SchemeConfig) -> None:
        """Sets the policy of a config after its variables are created."""
        # Before setting the policy, which would quantize again.
        compat.mark_quantized(self)
        if super().quantization_mode != config.mode:
            source = own_policy(self).name.rpartition("_from_")[-1]
            self.dtype_policy = keras.dtype_policies.get(f"{config.mode}_from_{source}")

    def renew_optimizers(self) -> None:
        """Replaces the optimizers of the layer's models after variables were added or removed."""
        optimizer_slots.renew_optimizers(self.weight_state.models)

    # Training in float8, for layers that support it.

    @property
    def trains_in_float8(self) -> bool:
        """Whether the layer has float weights, and scales for training in float8."""
        config = self.quantization_config
        return compat.has_quantized_variables(self) and config is not None and config.is_training

    def start_training(self, config: SchemeConfig) -> None:
        """Hook: adds the variables for training, all or none.

        Raises:
            NotImplementedError: the layer cannot be trained in this mode.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot train in {config.mode}; got {self.name!r}. Dense and "
            "EinsumDense can. Keep it in float, by filters=..., and quantize it after training."
        )

    def check_training(self) -> None:
        """Hook: raises the ValueError of `start_training`, and changes nothing."""

    def end_training(self) -> None:
        """Hook: removes the variables that `start_training` added."""

    def training_shapes(self) -> list[tuple[int, ...]]:
        """Hook: the shapes of the variables that `start_training` adds."""
        return []

    # Files.

    def save_own_variables(self, store: Any) -> None:
        """Writes the variables in the order that the class documents."""
        if compat.has_quantized_variables(self):
            files.save(self, store)
        else:
            super().save_own_variables(store)
        files.write_checksums(store)

    def load_own_variables(self, store: Any) -> None:
        """Reads variables from `save_own_variables`. A quantized file quantizes a float layer.

        Raises:
            ValueError: the file is damaged, or of another layer, or holds floating-point weights
                for a quantized layer, or weights that are quantized in another way. The layer is
                unchanged.
        """
        entries = files.read_entries(self.name, store)
        if compat.has_quantized_variables(self) or files.is_quantized(entries):
            return files.load(self, entries)
        files.check_holds_floats(self, entries)
        with files.restored_on_error(compat.own_variables(self)):
            super().load_own_variables(entries)

    def stock_matrix(self, name: str, shape: tuple[int, ...]) -> files.StockMatrix:
        """Hook: the matrix that stock Keras makes of a weight for int4: contracted axes first."""
        axes = self.declared_weights[name].axes(self)
        rows = math.prod(shape[a] for a in axes)
        return files.StockMatrix((rows, math.prod(shape) // max(rows, 1)), 0)

    def stock_scale_shape(self, name: str, like: QTensor) -> tuple[int, ...]:
        """Hook: the shape of an int8 scale in stock Keras: without the axes it is shared along."""
        shared = {a % like.ndim for a in self.declared_weights[name].axes(self)}
        return tuple(n for a, n in enumerate(like.scale.shape) if a not in shared)

    def scale_to_stock(self, name: str, scale: np.ndarray, like: QTensor) -> np.ndarray:
        """Hook: converts a scale to the int8 layout of stock Keras."""
        return scale.reshape(self.stock_scale_shape(name, like))

    def scale_from_stock(self, name: str, scale: np.ndarray, like: QTensor) -> np.ndarray:
        """Hook: undoes `scale_to_stock`."""
        return scale.reshape(like.scale.shape)

    def tensor_to_save(self, name: str) -> QTensor:
        """Hook: the quantized weight for stock Keras, such as with LoRA merged."""
        return self.stored_weights[name].on_host()

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments, and its quantization config if it has one."""
        config, quantization = super().get_config(), self.quantization_config
        if quantization is None:
            return config
        return {**config, "quantization_config": keras.saving.serialize_keras_object(quantization)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes the layer that `get_config` describes, with its quantization config."""
        config = dict(config)
        quantization = config.pop("quantization_config", None)
        layer = super().from_config(config)
        layer.quantization_config = keras.saving.deserialize_keras_object(quantization)
        return layer
