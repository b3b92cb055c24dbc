"""Copies models layer by layer and replaces the classes of layers."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras

from .. import compat
from ..layer import QuantizableMixin
from .alike import build_like, name_like, why_not_alike
from .checks import check_is_layer, raise_problems
from .composite import (
    identity,
    is_stock,
    lift_layer,
    mark_composites,
    original_class,
    original_config,
    quantizable_inside,
    replace_inside,
    undo_composites,
)
from .lifted import LiftedUse, why_not_lifted
from .multiplied import multiplied
from .state import copy_other_state, copy_variables, matched_layers, quantize_like


@dataclasses.dataclass(frozen=True, eq=False)
class ModelRewriter:
    """Copies one model, with layers of other classes.

    Layers, and models of classes with their own constructor, are made from their config. Other
    models are copied by their graph.

    Attributes:
        replace: class of a layer -> class of its copy, or None for the same.
        why_unsupported: layer -> why it cannot be copied, or None.
        why_not_quantizable: (layer, why its call cannot be lifted) -> the problem with its own
            weights; None if it has none, or they are quantizable.
        prepare: config of a layer -> config to make its copy from.
        replaces_inside: whether stock layers that custom layers create are made quantizable.
        keep: names and classes of layers that are copied as they are, with all layers in them.
        always_keep: more such classes -> the reason, for reports.
        strict: False copies layers as they are whose own weights cannot be quantized, and shares
            those that cannot be copied with the model.
        copies: the copy of each layer and model by the id of the original.
        lifts: by the id of an original, how it uses the weights that its copy quantizes by lifting.
        left: by the id of a copy, why it is kept although `keep` does not name it.
    """

    replace: Callable[[type], type | None]
    why_unsupported: Callable[[Any], str | None]
    why_not_quantizable: Callable[[Any, str], str | None] = lambda layer, reason: None
    prepare: Callable[[Any], Any] = lambda config: config
    replaces_inside: bool = False
    keep: tuple[str | type, ...] = ()
    always_keep: Mapping[type, str] = dataclasses.field(default_factory=dict)
    strict: bool = True
    copies: dict[int, Any] = dataclasses.field(default_factory=dict)
    lifts: dict[int, tuple[LiftedUse, ...]] = dataclasses.field(default_factory=dict)
    left: dict[int, str] = dataclasses.field(default_factory=dict)

    def why_kept(self, cls: type, name: str) -> str | None:
        """Why a layer is copied as it is, or None."""
        is_named = name in self.keep or original_class(cls) in self.keep
        return "kept" if is_named else self.always_keep.get(cls)

    def target(self, cls: type, name: str) -> type | None:
        """The class that replaces a layer's, or None."""
        return None if self.why_kept(cls, name) else self.replace(cls)

    def copy(self, model: Any, fill: Callable[[Any, Any], None] = copy_variables) -> Any:
        """Returns a copy of a model, not compiled.

        Args:
            model: built, or a Sequential model of layers that are not built.
            fill: called with each layer and its copy; copies the layer's own variables.

        Raises:
            ValueError: lists every layer that cannot be copied; or model is not a layer.
        """
        check_is_layer(model)
        units = list(_unique(self._units(model)))
        self._check(model, units)
        copy = self._copy(model)
        pairs = [pair for unit in units for pair in self._pairs(model, unit)]
        for old, new in pairs:
            fill(old, new)
            if old.built:
                copy_other_state(old, new)
        _set_trainable(model, copy, {id(old): new for old, new in pairs} | self.copies)
        return copy

    def walk(self, layer: Any, why_kept: str | None = None) -> Iterator[tuple[Any, str | None]]:
        """A layer and all layers in it, each with the reason why it is kept, or None."""
        found = self.left.get(id(layer)) or self.why_kept(type(layer), layer.name)
        why_kept = why_kept or found
        yield layer, why_kept
        for inner in compat.children(layer):
            yield from self.walk(inner, why_kept)

    # First: can every layer be copied?

    def _units(self, layer: Any) -> Iterator[Any]:
        """What is copied from its config; other models are copied by their graph."""
        is_made = not _has_graph(layer)
        if is_made or (not _has_stock_constructor(layer) and self._make(layer) is None):
            yield layer
            return
        for inner in layer.layers:
            if not isinstance(inner, keras.layers.InputLayer):
                yield from self._units(inner)

    def _check(self, model: Any, units: list[Any]) -> None:
        rewritten = list(_unique(x for x, why_kept in self.walk(model) if why_kept is None))
        found = [(x, why) for x in rewritten if (why := self.why_unsupported(x))]
        bare = self._not_quantizable(model, rewritten)
        found += bare if self.strict else []
        known = {id(x) for x, _ in found}
        for unit in units:
            why = self._why_not_made(model, unit)
            found += [(unit, why)] if why and id(unit) not in known else []
        problems = [f"{x.path or x.name}: {why}" for x, why in found]
        present = [x for y in compat.sublayers(model) for x in (y.name, original_class(type(y)))]
        names = [x.name for x in compat.sublayers(model)[1:]]
        advice = f"layers are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        problems += [f"keep: no layer is {x!r}; {advice}" for x in self.keep if x not in present]
        raise_problems(model, problems)

    def _not_quantizable(self, model: Any, layers: list[Any]) -> list[tuple[Any, str]]:
        """Custom layers that multiply with their own weights and cannot be lifted, and why."""
        found = [x for x in layers if any(_is_matrix(v) for v in compat.own_variables(x))]
        found = [x for x in found if self.why_not_quantizable(x, "")]
        used = multiplied(model) if found else {}
        reasons = [(x, self._why_not_lifted(x, used)) for x in found]
        return [(x, str(self.why_not_quantizable(x, why))) for x, why in reasons if why]

    def _why_not_lifted(self, layer: Any, used: dict[int, LiftedUse | None]) -> str | None:
        """Plans to lift a layer that multiplies with its weights; why that cannot be, or None."""
        ids = [id(v) for v in compat.own_variables(layer)]
        used = used if used.keys() >= set(ids) else multiplied(layer)
        if not used.keys() >= set(ids):
            return "its call cannot be traced without an input"
        own = tuple(use for key in ids if (use := used[key]) is not None)
        why = why_not_lifted(layer, own)
        if own and why is None:
            self.lifts[id(layer)] = own
        return why

    def _why_not_made(self, model: Any, unit: Any) -> str | None:
        """Makes the copy of a unit; returns why that is an error, or None."""
        why = None if id(unit) in self.copies else self._make(unit)
        if why is None:
            return self._why_not_built(unit)
        is_kept = self.why_kept(type(unit), unit.name) is not None
        if unit is model or not unit.built or (self.strict and not is_kept):
            return why
        twin = self.copies[id(unit)] = compat.detached(unit)
        self.left[id(twin)] = f"shared with the given model: {why}"
        return None

    def _why_not_built(self, unit: Any) -> str | None:
        """Why layers inside of a unit cannot be replaced yet, or None."""
        if unit.built or not self.replaces_inside or self.why_kept(type(unit), unit.name):
            return None
        names = [x.name for x in compat.sublayers(self.copies[id(unit)]) if self.replace(type(x))]
        why = f"{original_class(type(unit)).__name__} is not built; call the model on data first"
        return why if names else None

    def _make(self, layer: Any) -> str | None:
        """Makes the copy of a layer, not yet built, or returns why it cannot be made."""
        classes = {original_class(type(x)) for x in compat.sublayers(layer)}
        custom = {cls.__name__: cls for cls in classes if not is_stock(cls)}
        cls = self.target(type(layer), layer.name) or original_class(type(layer))
        is_kept = self.why_kept(type(layer), layer.name) is not None
        try:
            config = self._translated(self.prepare(original_config(layer)), is_kept)
            with keras.saving.CustomObjectScope(custom), compat.trusted():
                copy = cls.from_config(config)
        except Exception as error:  # `get_config` and the constructor are the user's.
            text = " ".join(str(error).partition("Example:")[0].split())
            return (
                f"{original_class(type(layer)).__name__} cannot be made from its config: "
                f"{type(error).__name__}: {text.rstrip('.')}. Write its get_config, and register "
                "the objects in it with keras.saving"
            )
        undo_composites(copy)
        self.copies[id(layer)] = copy
        # A config holds the code of a function, but not the variables that it closes over.
        pairs = zip(_lambdas(layer), _lambdas(copy), strict=False)
        for old, new in pairs:
            new.function = old.function
        return None

    def _translated(self, config: Any, is_kept: bool) -> Any:
        """A config in which the layers that are not kept have their new classes."""
        if isinstance(config, list | tuple):
            return type(config)([self._translated(x, is_kept) for x in config])
        if not isinstance(config, dict):
            return config
        cls, inner = _class_in(config), config.get("config")
        name = inner.get("name", "") if isinstance(inner, dict) else ""
        is_kept = is_kept or (cls is not None and self.why_kept(cls, name) is not None)
        config = {key: self._translated(x, is_kept) for key, x in config.items()}
        if cls:
            # A layer that is built on its own would not have the path of its parent.
            config.pop("build_config", None)
        target = cls and not is_kept and isinstance(inner, dict) and self.replace(cls)
        return {**config, **identity(target)} if target else config

    # Then the graph.

    def _copy(self, layer: Any) -> Any:
        if id(layer) not in self.copies:
            is_sequential = isinstance(layer, keras.Sequential)
            build = self._sequential if is_sequential else self._functional
            self.copies[id(layer)] = build(layer)
        return self.copies[id(layer)]

    def _sequential(self, model: Any) -> Any:
        copies = [self._copy(layer) for layer in model.layers]
        cls = _class_of_copy(model, keras.Sequential)
        return cls([*_starts(model), *copies], name=model.name)

    def _functional(self, model: Any) -> Any:
        # Keras would compile the copy of a compiled model.
        cls = _class_of_copy(model, keras.Model)
        shell = cls(model.input, model.output, name=model.name)
        starts = keras.tree.map_structure(_start, model.input)
        return keras.models.clone_model(shell, starts, clone_function=self._copy_operation)

    def _copy_operation(self, operation: Any) -> Any:
        if isinstance(operation, keras.layers.Layer):
            return self._copy(operation)
        return type(operation).from_config(operation.get_config())

    def _pairs(self, model: Any, unit: Any) -> list[tuple[Any, Any]]:
        """The layers of a unit with their copies, once those are built and of their classes."""
        copy = self.copies[id(unit)]
        if id(copy) in self.left:
            return []
        if unit.built and not copy.built:
            copy.build_from_config(unit.get_build_config())
        pairs = matched_layers(unit, copy)
        why = why_not_alike(unit, copy, pairs)
        raise_problems(model, [f"{unit.path or unit.name}: {why}"] if why else [])
        for old, new in reversed(pairs):  # Inner layers first.
            build_like(old, new)
            name_like(old, new)
        if self.replaces_inside:
            self._replace_inside(copy, pairs)
        else:
            raise_problems(model, self._not_replaced(pairs))
        return pairs

    def _replace_inside(self, copy: Any, pairs: list[tuple[Any, Any]]) -> None:
        """Makes layers that custom layers have created quantizable, and quantized as they were."""
        ours = [(old, new) for old, new in pairs if isinstance(old, QuantizableMixin)]
        chosen = [(new, type(old)) for old, new in ours if type(new) is not type(old)]
        lifts = [(new, self.lifts[id(old)]) for old, new in pairs if id(old) in self.lifts]
        self._make_quantizable(copy, chosen, lifts)
        for old, new in ours:
            quantize_like(old, new)

    def _make_quantizable(
        self, model: Any, chosen: list[tuple[Any, type]], lifts: list[tuple[Any, Any]]
    ) -> None:
        """Replaces the chosen layers and the stock ones in a model, and lifts others."""
        kept = {id(x) for x, why in self.walk(model) if why} | {id(x) for x, _ in chosen}
        chosen = [*chosen, *((x, c) for x, c in quantizable_inside(model) if id(x) not in kept)]
        replace_inside(chosen)
        for layer, uses in lifts:
            lift_layer(layer, uses)
        mark_composites(model, {id(x) for x, _ in (*chosen, *lifts)})

    def in_place(self, model: Any) -> None:
        """Makes the layers of a built model quantizable in their places, as `copy` in its copy.

        Raises:
            ValueError: as for `copy`.
        """
        self._check(model, [])
        lifts = [(x, self.lifts[id(x)]) for x in compat.sublayers(model) if id(x) in self.lifts]
        self._make_quantizable(model, [], lifts)

    def _not_replaced(self, pairs: list[tuple[Any, Any]]) -> list[str]:
        """Layers that a custom layer creates in its own code, of classes to be replaced."""
        targets = [self.target(type(new), new.name) or type(new) for _, new in pairs]
        left = [p for p, cls in zip(pairs, targets, strict=True) if type(p[1]) is not cls]
        kept = {id(x) for old, _ in pairs for x, why in self.walk(old) if why}
        return [
            f"{old.path or old.name}: a custom layer creates it as {type(new).__name__} of "
            f"jaxquant in its own code; pass keep=[{old.name!r}]"
            for old, new in left
            if id(old) not in kept
        ]


def _is_matrix(variable: keras.Variable) -> bool:
    return len(variable.shape) > 1 and keras.backend.is_float_dtype(variable.dtype)


def _unique(items: Iterable[Any]) -> Iterable[Any]:
    return {id(x): x for x in items}.values()


def _has_graph(model: Any) -> bool:
    return isinstance(model, keras.Sequential) or compat.is_functional(model)


def _has_stock_constructor(model: Any) -> bool:
    maker = next(cls for cls in type(model).__mro__ if "__init__" in vars(cls))
    return is_stock(maker)


def _class_of_copy(model: Any, stock: type) -> type:
    """The model's class, or the stock one if the class defines its own constructor."""
    return type(model) if _has_stock_constructor(model) else stock


def _start(tensor: Any) -> Any:
    """A new input like one of a model."""
    layer = compat.origin(tensor)
    return keras.layers.InputLayer.from_config(layer.get_config()).output


def _starts(model: Any) -> list[Any]:
    """The input of a Sequential model that knows it."""
    try:
        return [_start(x) for x in model.inputs]
    except AttributeError:
        return []


def _lambdas(layer: Any) -> list[Any]:
    return [x for x in compat.sublayers(layer) if isinstance(x, keras.layers.Lambda)]


def _class_in(config: dict[str, Any]) -> Any:
    """The class of a layer that a config is the serialization of, or None."""
    name = config.get("class_name")
    if not isinstance(name, str):
        return None
    registered = keras.saving.get_registered_object(config.get("registered_name") or "")
    is_stock_layer = registered is None and config.get("module") == "keras.layers"
    return getattr(keras.layers, name, None) if is_stock_layer else registered


def _set_trainable(old: Any, new: Any, copies: Mapping[int, Any]) -> None:
    """Copies `trainable`, outer layers first, because Keras sets it on inner layers too."""
    if new.trainable != old.trainable:
        new.trainable = old.trainable
    for inner in compat.children(old):
        if id(inner) in copies:
            _set_trainable(inner, copies[id(inner)], copies)
