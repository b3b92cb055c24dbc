"""What makes a Keras layer quantizable: the hooks that Keras calls, from a declaration."""

import contextlib
import functools
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import keras

from ...core import QTensor, Scheme
from .. import compat
from ..configs import SchemeConfig, as_config, config_of_policy
from .aliases import AliasMixin, alias, check_reachable
from .optimizer_slots import TrainedMixin, weights_still_float
from .policy import PolicyMixin
from .weights import (
    QuantizedWeight,
    abstract_tensor,
    fit_groups,
    quantize_padded,
    store_weight,
)


class QuantizableMixin(TrainedMixin, PolicyMixin, AliasMixin):
    """Makes a Keras layer quantizable. Comes before the Keras layer among the bases.

        class Scale(QuantizableMixin, keras.layers.Layer):
            kernel = QuantizedWeight(axis=0)

            def build(self, input_shape):
                self.kernel = self.add_weight(name="kernel", shape=(input_shape[-1],))

            def call(self, inputs):
                return inputs * self.kernel

    The layer is written for floats: `self.kernel` is the variable, and once the layer is
    quantized the array that its codes stand for. So `call` is right in every mode. A layer
    whose product can use codes asks for `self.operand("kernel")`, and gives it to
    `jaxquant.matmul` and its like.

    Hooks, each to be overridden by name as in Keras' guides: `_int8_build(shape)` creates the
    variables, `_int8_call(...)` computes; so for int4 and float8. With several weights the
    builds also get the weight's name.

    Variables are saved in one order: codes of the declared weights, in the order of their
    declaration; the layer's other variables, those of hooks last; scales, and zero points, of
    each declared weight.
    """

    declared_weights: ClassVar[dict[str, QuantizedWeight]] = {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        declared = {}
        for base in reversed(cls.__mro__):
            own = vars(base).items()
            declared |= {k: v for k, v in own if isinstance(v, QuantizedWeight)}
        cls.declared_weights = declared

    def __new__(cls, *args: Any, **kwargs: Any):
        layer = super().__new__(cls, *args, **kwargs)
        # Not by setattr: Keras would track the variables in them once more.
        layer.__dict__.update(
            float_weights={}, stored_weights={}, aliases={}, hook_variables=(), is_building=False
        )
        layer.__dict__["models"] = weakref.WeakSet()
        layer.__dict__["build"] = _as_float(layer, layer.build)
        layer.__dict__["quantize"] = _with_our_config(layer, layer.quantize)
        return layer

    # The declaration, and what stands behind it.

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

    @property
    def declared_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the declared weights that the layer has, quantized or not."""
        found = {name: tuple(v.shape) for name, v in self.float_weights.items() if v is not None}
        found |= {name: weight.shape for name, weight in self.stored_weights.items()}
        return {name: found[name] for name in self.declared_weights if name in found}

    def has_codes(self, name: str) -> bool:
        """Whether `operand` gives codes: the weight is quantized, in groups that tile it."""
        stored = self.stored_weights.get(name)
        return stored is not None and not stored.is_padded

    def operand(self, name: str) -> QTensor | jax.Array:
        """The weight for a product: a QTensor, or an array where `has_codes` is False.

        A QTensor says by its `inputs` how the other operand is treated.
        """
        if name in self.stored_weights:
            return self.stored_weights[name].operand(self.compute_dtype)
        return jax.numpy.asarray(self.float_weights[name].value)

    def adapted(self, name: str, value: Any) -> Any:
        """Hook: what reading the attribute of a weight gives, such as with LoRA added."""
        return value

    @property
    def inputs_quantizer(self) -> Any:
        """The Keras quantizer of the inputs, or None."""
        return self.quantization_config and self.quantization_config.activation_quantizer

    # Building: a layer with a quantized policy gets codes where it asks for a float weight.

    @property
    def quantization_mode(self) -> str | None:
        """The quantization mode; None while building, so that the float path is taken."""
        return None if self.is_building else super().quantization_mode

    def add_weight(self, *args: Any, name: str | None = None, **kwargs: Any):
        """Creates a variable; the codes, scales and zero points of a declared weight instead."""
        if not self.is_building or name not in self.declared_weights:
            return super().add_weight(*args, name=name, **kwargs)
        mode = super().quantization_mode
        if mode is not None:
            given = self.quantization_config
            named = config_of_policy(_own_policy(self)) if given is None else given
            self.quantization_config = as_config(mode, named)
        if mode is None or self._plan(name, self.quantization_config) is None:
            self.float_weights[name] = super().add_weight(*args, name=name, **kwargs)
            return self.float_weights[name]
        self._allocate(mode, name, tuple(args[0] if args else kwargs["shape"]))
        compat.mark_quantized(self)
        return self.stored_weights[name].codes

    def _int8_build(self, shape: tuple[int, ...], name: str | None = None):
        """Hook: creates the variables of a weight of this shape, the only one or that named."""
        name = name or next(iter(self.declared_weights))
        like = self._like(name, shape, self._plan(name, self.quantization_config))
        self.stored_weights[name] = store_weight(super().add_weight, name, shape, like)

    def _int4_build(self, shape: tuple[int, ...], name: str | None = None):
        """Hook: see `_int8_build`."""
        QuantizableMixin._int8_build(self, shape, name)

    def _float8_build(self, shape: tuple[int, ...], name: str | None = None):
        """Hook: see `_int8_build`."""
        QuantizableMixin._int8_build(self, shape, name)

    def _allocate(self, mode, name, shape):
        """Calls the mode's build hook, as the guides write it if there is one weight."""
        build, known = getattr(self, f"_{mode}_build"), compat.own_variables(self)
        build(shape) if len(self.declared_weights) == 1 else build(shape, name)
        if name not in self.stored_weights:
            raise ValueError(
                f"{type(self).__name__}._{mode}_build must create the variables of {name!r}; got "
                f"{list(self.stored_weights)}. Call super()._{mode}_build in it."
            )
        held = {id(v) for v in (*known, *self.stored_weights[name].variables)}
        new = (v for v in compat.own_variables(self) if id(v) not in held)
        self.__dict__["hook_variables"] = (*self.hook_variables, *new)

    # Calling.

    def quantized_call(self, *args: Any, **kwargs: Any):
        """Calls the hook of the mode."""
        return getattr(self, f"_{self.quantization_mode}_call")(*args, **kwargs)

    def _int8_call(self, *args: Any, **kwargs: Any):
        """Hook: the forward pass in this mode."""
        return self.call(*args, **kwargs)

    def _int4_call(self, *args: Any, **kwargs: Any):
        """Hook: the forward pass in this mode."""
        return self.call(*args, **kwargs)

    def _float8_call(self, *args: Any, **kwargs: Any):
        """Hook: the forward pass in this mode."""
        return self.call(*args, **kwargs)

    # Quantizing: compute everything and check it, then switch.

    def quantize(self, mode: str | None = None, config: Any = None, type_check: bool = True):
        """Quantizes the declared weights in place.

        Args:
            mode: "int8", "int4" or "float8", with its default config.
            config: in place of the mode: a config of `jaxquant.keras`, or of Keras.
            type_check: Keras' own argument, without effect: subclasses are quantized too.

        Raises:
            NotImplementedError: the layer cannot be quantized in this mode.
            ValueError: the layer is not built, or quantized already, or the mode is unknown; a
                weight holds NaN or Inf, or comes back no nearer to itself than zeros are. The
                layer is left as it was.
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
        if config.is_training:
            return self.start_training(config)
        names = [n for n in self.declared_weights if self.float_weights.get(n) is not None]
        config = config.for_weights({name: self._path_of(name) for name in names})
        chosen = [name for name in names if self._plan(name, config) is not None]
        for name in chosen:
            check_reachable(self, name, self.float_weights[name])
        values = {name: self.float_weights[name].value for name in chosen}
        if chosen:
            tensors = {n: self.quantized_values(n, x, config) for n, x in values.items()}
            self.take_over(config, tensors)

    def _path_of(self, name):
        return f"{self.path or self.name}/{name}"

    def _plan(self, name, config):
        """(axes, scheme) of a weight, or None where it is left as it is."""
        rule = config.rule_for(self._path_of(name))
        scheme = rule and rule.resolve()
        if scheme is None or config.is_training:
            return None
        declared = self.declared_weights[name]
        axis = declared.axes(self) if rule.axis is None else rule.axis
        inputs = scheme.inputs if declared.inputs else None
        return axis if isinstance(axis, tuple) else (axis,), Scheme(scheme.weights, inputs)

    def _like(self, name, shape, plan):
        axes, scheme = plan
        config, axis, padded = fit_groups(shape, axes, scheme.weights)
        return abstract_tensor(padded, self.variable_dtype, config, axis, scheme.inputs)

    def quantized_values(self, name: str, values: jax.Array, config: SchemeConfig) -> QTensor:
        """What `config` makes of a declared weight with these values.

        Raises:
            ValueError: they hold NaN or Inf, or come back no nearer to themselves than zeros.
        """
        plan = self._plan(name, config)
        assert plan is not None, "asked for a weight that the config leaves"
        shape, (axes, scheme) = tuple(values.shape), plan
        like = self._like(name, shape, plan)
        array_config, axis, padded = fit_groups(shape, axes, scheme.weights)
        q, is_finite, noise = quantize_padded(values, array_config, axis, padded, like.order)
        path = self._path_of(name)
        if not is_finite:
            raise ValueError(f"{path} holds NaN or Inf; got shape {shape}. Mend it, then quantize.")
        if not noise < 1:  # NaN, too.
            raise ValueError(
                f"{path} would come back no nearer to itself than zeros are: the error has "
                f"{noise:.3g} times its norm. Got {array_config}; choose another range or "
                "scale_dtype."
            )
        return q

    def take_over(self, config: SchemeConfig, tensors: dict[str, QTensor]) -> None:
        """Puts quantized weights in the place of float ones, all or none of them.

        Args:
            config: what they were quantized by.
            tensors: weights by name, in the shapes and orders that `config` gives them.
        """
        if self.stored_weights:
            return self._assign(tensors)
        with self.all_or_nothing():
            self._fill(config, tensors)
        with compat.unlocked(self):
            for name in tensors:
                self._drop_float(name)
        self.switch_policy(config)
        self.renew_optimizers()

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Lets variables be created, and takes them back where that raises."""
        attributes, known = dict(self.__dict__), compat.own_variables(self)
        stored = dict(self.stored_weights)
        with compat.unlocked(self):
            try:
                yield
            except BaseException:
                self._forget_all_but(known)
                self.__dict__.clear()
                self.__dict__.update(attributes)
                self.__dict__["stored_weights"] = stored
                raise

    def switch_policy(self, config: SchemeConfig) -> None:
        """Takes the policy of a config, whose variables are there."""
        # Before the policy, whose setter would quantize again.
        compat.mark_quantized(self)
        if super().quantization_mode != config.mode:
            source = _own_policy(self).name.rpartition("_from_")[-1]
            self.dtype_policy = keras.dtype_policies.get(f"{config.mode}_from_{source}")

    def _fill(self, config, tensors):
        """Creates the quantized variables, beside the float ones."""
        self.quantization_config = config
        for name, q in tensors.items():
            self._allocate(config.mode, name, tuple(self.float_weights[name].shape))
            self.stored_weights[name].assign(q)

    def _forget_all_but(self, known):
        kept = {id(v) for v in known}
        for variable in compat.own_variables(self):
            if id(variable) not in kept:
                compat.drop_variable(self, variable)

    def _assign(self, tensors):
        """Takes over weights that are quantized as those that are there."""
        likes = {name: weight.like for name, weight in self.stored_weights.items()}
        for name, q in tensors.items():
            like = likes.get(name)
            if like is None or jax.eval_shape(_leaves, q) != jax.eval_shape(_leaves, like):
                raise ValueError(
                    f"{self.name} is quantized in another way; got {name!r} as {q!r} for "
                    f"{like!r}. Load it into a float layer, or one with the same config."
                )
        for name, q in tensors.items():
            self.stored_weights[name].assign(q)

    def _drop_float(self, name):
        variable = self.float_weights.pop(name)
        compat.drop_variable(self, variable)
        alias(self, variable, name)

    def likes(self, config: SchemeConfig) -> dict[str, QTensor]:
        """Shapes and dtypes of the weights that a config quantizes, by name."""
        shapes = self.declared_shapes
        plans = {name: self._plan(name, config) for name in shapes}
        return {n: self._like(n, shapes[n], plan) for n, plan in plans.items() if plan is not None}


def _leaves(q):
    return jax.tree.leaves(q)


def _as_float(layer, build):
    """Keras' build, in which the layer takes its float path: `add_weight` does the rest."""

    @functools.wraps(build)
    def build_as_float(*args, **kwargs):
        layer.__dict__["is_building"] = True
        try:
            built = build(*args, **kwargs)
        finally:
            layer.__dict__["is_building"] = False
        for name, stored in layer.stored_weights.items():
            check_reachable(layer, name, stored.codes)
            alias(layer, stored.codes, name)
        # Float weights under a quantized policy: they are to be trained.
        config = layer.quantization_config
        if layer.quantization_mode is not None and config is not None and config.is_training:
            layer.start_training(config)
        return built

    return build_as_float


def _with_our_config(layer, quantize):
    """Keras' checked `quantize`, with our defaults, the same in every version of Keras."""

    @functools.wraps(quantize)
    def quantize_with_config(mode=None, config=None, **kwargs):
        policy = _own_policy(layer)
        is_named = config is None and mode is not None and mode == policy.quantization_mode
        try:
            config = config_of_policy(policy) if is_named else as_config(mode, config)
            with weights_still_float(layer, config):
                return quantize(mode=mode, config=config, **kwargs)
        except AttributeError as error:
            # Keras takes it for a layer that has no `quantize`, and says nothing.
            raise RuntimeError(f"quantize({mode!r}, {config!r}) failed: {error}") from error

    return quantize_with_config


def _own_policy(layer):
    """The layer's policy, where it has a map of them too."""
    policy = layer.dtype_policy
    is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
    return policy[layer.path] if is_map and layer.path else policy
