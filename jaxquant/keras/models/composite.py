"""Custom layers and models that create their own layers, with quantizable ones in place of those.

The class of such a layer stays a base of its class. Its config is that of the original, so that a
file can be loaded: the layers are created by the original's code, and replaced before their
weights are read.
"""

import functools
from collections.abc import Iterable
from typing import Any

import keras

from .. import compat, layers
from ..layer import QuantizableMixin, recast
from .lifted import LiftedMixin, LiftedUse, lifted_weights, lifts_in, uses_in

# Stock wrappers that hold a weight of their layer as a variable too, and save it as their own.
SHARE_WEIGHTS = {
    keras.layers.SpectralNormalization: "SpectralNormalization shares it with its layer"
}


def is_stock(cls: type) -> bool:
    """Whether Keras itself has the class."""
    return cls.__module__.partition(".")[0] == keras.__name__


def stock_base(cls: type) -> type:
    """The class of Keras that a quantizable layer derives from first."""
    return next(base for base in cls.__mro__ if is_stock(base))


# The quantizable layer that replaces exactly this stock class.
COUNTERPARTS: dict[type, type] = {
    stock_base(ours): ours
    for ours in vars(layers).values()
    if isinstance(ours, type) and not is_stock(ours)
}


def in_float(config: Any) -> Any:
    """A config without quantization, also in the configs of inner layers."""
    if isinstance(config, list | tuple):
        return type(config)([in_float(x) for x in config])
    if not isinstance(config, dict):
        return config
    name = str(config.get("class_name"))
    if name.endswith("DTypePolicy"):
        policy = keras.dtype_policies.deserialize(config)
        floats = keras.dtype_policies.get(policy.name.rpartition("_from_")[2])
        return keras.dtype_policies.serialize(floats) if policy.quantization_mode else config
    return {key: in_float(x) for key, x in config.items() if key != "quantization_config"}


class CompositeMixin(compat.StoresItsWeights):
    """A custom layer or model with quantizable layers in place of the stock ones it has created.

    Attributes:
        original: the class that it had.
    """

    original: type

    def get_config(self) -> dict[str, Any]:
        """The class and the config of the original, as if none of its layers was quantized."""
        # KerasHub would write a map of quantized policies, and lose the dtype of the others.
        with compat.policies_in_float(self):
            config = super().get_config()
        found = {"original": identity(self.original), "config": in_float(config)}
        lifts = lifts_in(self)
        return {**found, "lifts": lifts} if lifts else found

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The original, which replaces its layers when weights are loaded."""
        original = {**config["original"], "config": config["config"]}
        made = as_composite(keras.saving.deserialize_keras_object(original))
        # Not by setattr: Keras would track it.
        made.__dict__["lifts"] = config.get("lifts", {})
        return made

    def load_own_variables(self, store: Any) -> None:
        """Replaces the layers, which Keras loads next; then as the original."""
        inside = compat.sublayers(self)
        for place, uses in self.__dict__.pop("lifts", {}).items():
            lift_layer(inside[int(place)], uses_in(uses))
        replace_inside(quantizable_inside(self))
        super().load_own_variables(store)


_register = keras.saving.register_keras_serializable(package="jaxquant", name="Composite")
_register(CompositeMixin)


@functools.cache
def _composite_class(cls: Any, uses: tuple[LiftedUse, ...] = ()) -> type:
    """The subclass of CompositeMixin and of a custom class, under the name of the latter."""
    bases = (CompositeMixin, LiftedMixin, cls) if uses else (CompositeMixin, cls)
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "original": cls,
        "get_config": compat.with_default_mark(CompositeMixin.get_config, cls.get_config),
        **lifted_weights(uses),
    }
    made = _register(type(cls)(cls.__name__, bases, namespace))
    # The last class that was registered is the one that files are loaded with.
    _register(CompositeMixin)
    return made


def as_composite(layer: Any) -> Any:
    """The same layer or model, as one whose layers may be replaced."""
    if not isinstance(layer, CompositeMixin):
        layer.__class__ = _composite_class(type(layer))
    return layer


def lift_layer(layer: Any, uses: tuple[LiftedUse, ...]) -> None:
    """Makes a built custom layer quantizable in its place, by lifting its call."""
    if not isinstance(layer, LiftedMixin):
        recast(layer, _composite_class(original_class(type(layer)), uses))


def original_class(cls: Any) -> Any:
    """The class that a composite had; any other class as it is."""
    return getattr(cls, "original", cls) if issubclass(cls, CompositeMixin) else cls


def original_config(layer: Any) -> dict[str, Any]:
    """The config of the original of a composite, and of any other layer."""
    config = layer.get_config()
    return config["config"] if isinstance(layer, CompositeMixin) else config


def undo_composites(layer: Any) -> None:
    """Gives composites in a layer the classes they had."""
    for inner in compat.sublayers(layer):
        if isinstance(inner, CompositeMixin):
            inner.__dict__.pop("lifts", None)
            inner.__class__ = inner.original


def quantizable_inside(layer: Any) -> list[tuple[Any, type]]:
    """The stock layers within a layer that have a quantizable counterpart, and that."""
    shared = [x for x in compat.sublayers(layer) if type(x) in SHARE_WEIGHTS]
    kept = {id(x) for wrapper in shared for x in compat.sublayers(wrapper)}
    found: list[tuple[Any, type]] = []
    for inner in compat.sublayers(layer):
        ours = COUNTERPARTS.get(type(inner))
        # Other counterparts are quantizable through their sublayers.
        if ours is not None and issubclass(ours, QuantizableMixin) and id(inner) not in kept:
            found += [(inner, ours)] if inner.built else []
    return found


def replace_inside(chosen: Iterable[tuple[Any, type]]) -> None:
    """Makes each of the layers one of the class beside it."""
    for layer, cls in chosen:
        recast(layer, cls)


def mark_composites(layer: Any, replaced: set[int]) -> None:
    """Makes composites of the custom layers in a layer that hold replaced ones, given by id."""
    for outer in compat.sublayers(layer):
        is_custom = not is_stock(type(outer)) and not isinstance(outer, QuantizableMixin)
        if is_custom and any(id(x) in replaced for x in compat.sublayers(outer)):
            as_composite(outer)


def identity(cls: Any) -> dict[str, Any]:
    """How a serialized layer names its class."""
    if is_stock(cls):
        # Keras exports GroupedQueryAttention under another name.
        name = next(name for name, known in vars(keras.layers).items() if known is cls)
        return {"module": "keras.layers", "class_name": name, "registered_name": None}
    registered = keras.saving.get_registered_name(cls)
    return {"module": cls.__module__, "class_name": cls.__name__, "registered_name": registered}
