"""Copies models layer by layer and replaces the classes of layers."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras

from .. import compat
from .state import copy_other_state, copy_variables, matched

Keep = Iterable[str | type]


def is_stock(cls: type) -> bool:
    """Whether Keras itself has the class."""
    return cls.__module__.partition(".")[0] == keras.__name__


def raise_problems(model: keras.Model, problems: list[str]) -> None:
    """Raises one ValueError for all of them, if there are any."""
    if problems:
        lines = "\n  ".join(problems)
        count = f"these {len(problems)} problems" if len(problems) > 1 else "this problem"
        raise ValueError(f"Model {model.name!r} was not changed; fix {count}:\n  {lines}")


@dataclasses.dataclass(frozen=True, eq=False)
class ModelRewriter:
    """Copies one model, with layers of other classes.

    Attributes:
        replace: class of a layer -> class of its copy, or None for the same.
        why_unsupported: layer -> why it cannot be copied, or None.
        prepare: config of a layer -> config to make its copy from.
        keep: names and classes of layers that are copied as they are, with all layers in them.
        always_keep: more such classes -> the reason, for reports.
    """

    replace: Callable[[type], type | None]
    why_unsupported: Callable[[Any], str | None]
    prepare: Callable[[Any], Any] = lambda config: config
    keep: tuple[str | type, ...] = ()
    always_keep: Mapping[type, str] = dataclasses.field(default_factory=dict)
    copies: dict[int, Any] = dataclasses.field(default_factory=dict)

    def why_kept(self, cls: type, name: str) -> str | None:
        """Why a layer is copied as it is, or None."""
        return "kept" if name in self.keep or cls in self.keep else self.always_keep.get(cls)

    def target(self, cls: type, name: str) -> type | None:
        """The class that replaces a layer's, or None."""
        return None if self.why_kept(cls, name) else self.replace(cls)

    def copy(self, model: Any, fill: Callable[[Any, Any], None] = copy_variables) -> Any:
        """Returns a copy of a model, not compiled.

        Args:
            model: functional or Sequential.
            fill: called with each layer and its copy; copies the layer's own variables.

        Raises:
            ValueError: lists every layer that cannot be copied.
        """
        layers = list(_unique(_graph_layers(model)))
        self._check(model, layers)
        copy = self._copy(model)
        pairs = [pair for layer in layers for pair in self._pairs(layer)]
        for old, new in pairs:
            fill(old, new)
            if old.built:
                copy_other_state(old, new)
        _set_trainable(model, copy, {id(old): new for old, new in pairs} | self.copies)
        return copy

    def walk(self, layer: Any, why_kept: str | None = None) -> Iterator[tuple[Any, str | None]]:
        """A layer and all layers in it, each with the reason why it is kept, or None."""
        why_kept = why_kept or self.why_kept(type(layer), layer.name)
        yield layer, why_kept
        for inner in compat.children(layer):
            yield from self.walk(inner, why_kept)

    # First: can every layer be copied?

    def _check(self, model: Any, layers: list[Any]) -> None:
        rewritten = _unique(x for x, why_kept in self.walk(model) if why_kept is None)
        found = [(x, why) for x in rewritten if (why := self._why_unsupported(x))]
        known = {id(x) for x, _ in found}
        for layer in layers:
            why = self._make(layer) or self._why_not_replaced(layer)
            found += [(layer, why)] if why and id(layer) not in known else []
        problems = [f"{layer.path or layer.name}: {why}" for layer, why in found]
        present = [x for layer in compat.sublayers(model) for x in (layer.name, type(layer))]
        problems += [f"keep: no layer is {x!r}" for x in self.keep if x not in present]
        raise_problems(model, problems)

    def _why_unsupported(self, layer: Any) -> str | None:
        if isinstance(layer, keras.Model) and not _has_graph(layer):
            return (
                f"{type(layer).__name__} is a subclassed model, which creates its layers in code; "
                "write it with layers of jaxquant.keras.layers, or as a functional model"
            )
        return self.why_unsupported(layer)

    def _make(self, layer: Any) -> str | None:
        """Makes the copy of a layer, not yet built, or returns why it cannot be made."""
        classes = {type(x) for x in compat.sublayers(layer)}
        custom = {cls.__name__: cls for cls in classes if not is_stock(cls)}
        cls = self.target(type(layer), layer.name) or type(layer)
        is_kept = self.why_kept(type(layer), layer.name) is not None
        try:
            config = self._translated(self.prepare(layer.get_config()), is_kept)
            with keras.saving.CustomObjectScope(custom), compat.trusted():
                copy = cls.from_config(config)
        except (NotImplementedError, TypeError, ValueError) as error:
            return (
                f"{type(layer).__name__} cannot be made from its config: {error}. Write its "
                "get_config, and register the objects in it with keras.saving"
            )
        self.copies[id(layer)] = copy
        # A config holds the code of a function, but not the variables that it closes over.
        pairs = zip(_lambdas(layer), _lambdas(copy), strict=False)
        for old, new in pairs:
            new.function = old.function
        return None

    def _why_not_replaced(self, layer: Any) -> str | None:
        """Why layers that a custom layer creates cannot be replaced, or None."""
        cls = type(layer)
        if self.why_kept(cls, layer.name) or is_stock(cls) or self.replace(cls) is not None:
            return None
        expected = {x.name for x in compat.sublayers(layer) if self.target(type(x), x.name)}
        copies = compat.sublayers(self.copies[id(layer)])
        left = expected - {x.name for x in copies if self.replace(type(x)) is None}
        if not left:
            return None
        return (
            f"{cls.__name__} creates {sorted(left)} in its own code, where they cannot be "
            "replaced. Use layers of jaxquant.keras.layers there, or pass "
            f"keep=[{layer.name!r}]"
        )

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
        return {**config, **_identity(target)} if target else config

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

    def _pairs(self, layer: Any) -> list[tuple[Any, Any]]:
        copy = self.copies[id(layer)]
        if layer.built and not copy.built:
            copy.build_from_config(layer.get_build_config())
        return matched(compat.sublayers(layer), compat.sublayers(copy))


def _unique(items: Iterable[Any]) -> Iterable[Any]:
    return {id(x): x for x in items}.values()


def _has_graph(model: Any) -> bool:
    return isinstance(model, keras.Sequential) or compat.is_functional(model)


def _class_of_copy(model: Any, stock: type) -> type:
    """The model's class, or the stock one if the class defines its own constructor."""
    maker = next(cls for cls in type(model).__mro__ if "__init__" in vars(cls))
    return type(model) if is_stock(maker) else stock


def _graph_layers(model: Any) -> Iterator[Any]:
    """Layers of the graph, those of nested models in their place."""
    for layer in model.layers if _has_graph(model) else []:
        if isinstance(layer, keras.Model):
            yield from _graph_layers(layer)
        elif not isinstance(layer, keras.layers.InputLayer):
            yield layer


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


def _identity(cls) -> dict[str, Any]:
    """How a serialized layer names its class."""
    if is_stock(cls):
        return {"module": "keras.layers", "class_name": cls.__name__, "registered_name": None}
    registered = keras.saving.get_registered_name(cls)
    return {"module": cls.__module__, "class_name": cls.__name__, "registered_name": registered}


def _set_trainable(old: Any, new: Any, copies: Mapping[int, Any]) -> None:
    """Copies `trainable`, outer layers first, because Keras sets it on inner layers too."""
    if new.trainable != old.trainable:
        new.trainable = old.trainable
    for inner in compat.children(old):
        if id(inner) in copies:
            _set_trainable(inner, copies[id(inner)], copies)
