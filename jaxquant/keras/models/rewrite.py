"""Copies of whole models, layer by layer, in which layers have other classes."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import keras

from .. import compat

Keep = Iterable[str | type]


def is_stock(cls: type) -> bool:
    """Whether Keras itself has the class."""
    return cls.__module__.partition(".")[0] == keras.__name__


def matched(old: Iterable[Any], new: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Pairs of variables, or of layers, of two copies: by path, and the others in their order."""
    places = defaultdict(list)
    for x in new:
        places[x.path].append(x)
    pairs, rest = [], []
    for x in old:
        if places[x.path]:
            pairs.append((x, places[x.path].pop(0)))
        else:
            rest.append(x)
    left = [x for found in places.values() for x in found]
    return pairs + list(zip(rest, left, strict=True))


def copy_variables(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Gives a layer's own variables to its copy.

    As new arrays: training donates those of one model, and would empty the other.
    """
    share_variables(old, new)
    for variable in [*compat.own_variables(new), *compat.seeds(new)]:
        variable.assign(jnp.copy(variable.value))


def share_variables(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """As `copy_variables`, by the same arrays."""
    pairs = matched(compat.own_variables(old), compat.own_variables(new))
    # Keras counts the seeds that it makes, in their paths too.
    pairs += zip(compat.seeds(old), compat.seeds(new), strict=True)
    for source, target in pairs:
        target.assign(source.value)
        if target.trainable != source.trainable:
            target.trainable = source.trainable


@dataclasses.dataclass(frozen=True, eq=False)
class Copier:
    """Copies one model.

    Attributes:
        replace: class of a layer -> that of its copy, or None for the same.
        refuse: layer -> why it cannot be copied, or None.
        prepare: config of a layer -> the one to make its copy from.
        keep: names and classes of layers that are copied as they are.
    """

    replace: Callable[[type], type | None]
    refuse: Callable[[Any], str | None]
    prepare: Callable[[Any], Any] = lambda config: config
    keep: tuple[str | type, ...] = ()
    copies: dict[int, Any] = dataclasses.field(default_factory=dict)

    def target(self, cls: type, name: str) -> type | None:
        """The class that takes the place of a layer's, if one does."""
        return None if name in self.keep or cls in self.keep else self.replace(cls)

    def copy(self, model: Any, fill: Callable[[Any, Any], None] = copy_variables) -> Any:
        """The copy of a model, not compiled.

        Args:
            model: functional or Sequential.
            fill: (layer, copy) gives the layer's own variables to the copy.

        Raises:
            ValueError: lists every layer that cannot be copied.
        """
        layers = list(_unique(_graph_layers(model)))
        self._check(model, layers)
        copy = self._copy(model)
        pairs = [pair for layer in layers for pair in self._pairs(layer)]
        for old, new in pairs:
            fill(old, new)
        _set_trainable(model, copy, {id(old): new for old, new in pairs} | self.copies)
        return copy

    # Before anything else: is every layer one that can be copied?

    def _check(self, model, layers):
        found = [(x, why) for x in _unique(self.inspected(model)) if (why := self._problem(x))]
        refused = {id(x) for x, _ in found}
        for layer in layers:
            why = self._make(layer) or self._missed(layer)
            found += [(layer, why)] if why and id(layer) not in refused else []
        problems = [f"{layer.path or layer.name}: {why}" for layer, why in found]
        present = [x for layer in compat.sublayers(model) for x in (layer.name, type(layer))]
        problems += [f"keep: {x!r} is in no layer" for x in self.keep if x not in present]
        if problems:
            lines = "\n  ".join(problems)
            raise ValueError(
                f"Model {model.name!r} stays as it was. {len(problems)} to mend:\n  {lines}"
            )

    def inspected(self, layer) -> Iterator[Any]:
        """A layer and those in it, but for what is in layers that are kept."""
        if layer.name in self.keep or type(layer) in self.keep:
            return
        yield layer
        for inner in compat.children(layer):
            yield from self.inspected(inner)

    def _problem(self, layer):
        if isinstance(layer, keras.Model) and not _has_graph(layer):
            return (
                f"{type(layer).__name__} is a subclassed model, whose code makes its layers; write "
                "it with layers of jaxquant.keras.layers, or as a functional model"
            )
        return self.refuse(layer)

    def _make(self, layer):
        """Makes the copy of a layer, not yet built; or says why it cannot be made."""
        classes = {type(x) for x in compat.sublayers(layer)}
        custom = {cls.__name__: cls for cls in classes if not is_stock(cls)}
        cls = self.target(type(layer), layer.name) or type(layer)
        try:
            config = self._translated(self.prepare(layer.get_config()))
            with keras.saving.CustomObjectScope(custom), compat.trusted():
                copy = cls.from_config(config)
        except (NotImplementedError, TypeError, ValueError) as error:
            return (
                f"{type(layer).__name__} cannot be made from its config: {error}. Write its "
                "get_config, and register by keras.saving what it names"
            )
        self.copies[id(layer)] = copy
        # The code of a function outlives a config, but not what it refers to.
        pairs = zip(_lambdas(layer), _lambdas(copy), strict=False)
        for old, new in pairs:
            new.function = old.function
        return None

    def _missed(self, layer):
        """Says which layers of someone else's layer are not in its config, if any."""
        cls = type(layer)
        is_kept = layer.name in self.keep or cls in self.keep
        if is_kept or is_stock(cls) or self.replace(cls) is not None:
            return None
        wanted = {x.name for x in compat.sublayers(layer) if self.target(type(x), x.name)}
        copies = compat.sublayers(self.copies[id(layer)])
        missed = wanted - {x.name for x in copies if self.replace(type(x)) is None}
        if not missed:
            return None
        return (
            f"{cls.__name__} makes {sorted(missed)} by its own code, where no copy can replace "
            f"them. Write the classes of layers that you want in it, or pass keep=[{layer.name!r}]"
        )

    def _translated(self, config: Any) -> Any:
        """A config in which serialized layers have the classes that take their places."""
        if isinstance(config, list | tuple):
            return type(config)([self._translated(x) for x in config])
        if not isinstance(config, dict):
            return config
        config = {key: self._translated(x) for key, x in config.items()}
        cls, inner = _class_in(config), config.get("config")
        target = cls and isinstance(inner, dict) and self.target(cls, inner.get("name", ""))
        if cls:
            # Built by itself, a layer would not have the path of what it is in.
            config.pop("build_config", None)
        return {**config, **_identity(target)} if target else config

    # Then the graph.

    def _copy(self, layer):
        if id(layer) not in self.copies:
            is_sequential = isinstance(layer, keras.Sequential)
            build = self._sequential if is_sequential else self._functional
            self.copies[id(layer)] = build(layer)
        return self.copies[id(layer)]

    def _sequential(self, model):
        copies = [self._copy(layer) for layer in model.layers]
        cls = _class_of_copy(model, keras.Sequential)
        return cls([*_starts(model), *copies], name=model.name)

    def _functional(self, model):
        # Keras would compile the copy of a compiled model.
        cls = _class_of_copy(model, keras.Model)
        shell = cls(model.input, model.output, name=model.name)
        starts = keras.tree.map_structure(_start, model.input)
        return keras.models.clone_model(shell, starts, clone_function=self._copy_operation)

    def _copy_operation(self, operation):
        if isinstance(operation, keras.layers.Layer):
            return self._copy(operation)
        return type(operation).from_config(operation.get_config())

    def _pairs(self, layer):
        copy = self.copies[id(layer)]
        if layer.built and not copy.built:
            copy.build_from_config(layer.get_build_config())
        return matched(compat.sublayers(layer), compat.sublayers(copy))


def _unique(items):
    return {id(x): x for x in items}.values()


def _has_graph(model):
    return isinstance(model, keras.Sequential) or compat.is_functional(model)


def _class_of_copy(model, stock):
    """The model's class, or the stock one if it has a constructor of its own."""
    maker = next(cls for cls in type(model).__mro__ if "__init__" in vars(cls))
    return type(model) if is_stock(maker) else stock


def _graph_layers(model) -> Iterator[Any]:
    """Layers of the graph, those of nested models in their place."""
    for layer in model.layers if _has_graph(model) else []:
        if isinstance(layer, keras.Model):
            yield from _graph_layers(layer)
        elif not isinstance(layer, keras.layers.InputLayer):
            yield layer


def _start(tensor):
    """A new input like one of a model."""
    layer = compat.origin(tensor)
    return keras.layers.InputLayer.from_config(layer.get_config()).output


def _starts(model):
    """The input of a Sequential model that knows it."""
    try:
        return [_start(x) for x in model.inputs]
    except AttributeError:
        return []


def _lambdas(layer):
    return [x for x in compat.sublayers(layer) if isinstance(x, keras.layers.Lambda)]


def _class_in(config):
    """The class of a layer that a config is the serialization of, or None."""
    name = config.get("class_name")
    if not isinstance(name, str):
        return None
    registered = keras.saving.get_registered_object(config.get("registered_name") or "")
    is_stock_layer = registered is None and config.get("module") == "keras.layers"
    return getattr(keras.layers, name, None) if is_stock_layer else registered


def _identity(cls):
    """How a serialized layer names its class."""
    if is_stock(cls):
        return {"module": "keras.layers", "class_name": cls.__name__, "registered_name": None}
    registered = keras.saving.get_registered_name(cls)
    return {"module": cls.__module__, "class_name": cls.__name__, "registered_name": registered}


def _set_trainable(old, new, copies):
    """Says which layers are, outer ones first: Keras passes it on to those within."""
    if new.trainable != old.trainable:
        new.trainable = old.trainable
    for inner in compat.children(old):
        if id(inner) in copies:
            _set_trainable(inner, copies[id(inner)], copies)
