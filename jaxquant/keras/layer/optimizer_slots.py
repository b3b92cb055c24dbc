"""Optimizers of models in which trainable variables are added or removed."""

import functools
import warnings
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import keras

from .. import compat


def note_model(models: Any) -> None:
    """Adds the model that is being called, if any, to the models of a layer."""
    model = compat.running_layer()
    if isinstance(model, keras.Model) and model not in models:
        models.add(model)
        if _is_outdated(model):
            _renew_before_training(model)


def renew_optimizers(models: Iterable[keras.Model], gone: Sequence[keras.Variable] = ()) -> None:
    """Replaces optimizers that hold slots for variables that are gone.

    Optimizers that are not built yet have no slots: they warn when they are built.

    Args:
        models: models of a layer; the one that is being quantized is among them.
        gone: float variables of the layer that were quantized.
    """
    frozen = [variable.path for variable in gone if variable.trainable]
    for model in {*models, *compat.model_being_quantized()}:
        optimizer = getattr(model, "optimizer", None)
        if optimizer is not None and optimizer.built:
            optimizer = successor(optimizer)
            compat.replace_optimizer(model, optimizer)
        if _is_successor(optimizer):
            vars(optimizer)["build"].release({variable.path for variable in gone})
        elif frozen and optimizer is not None:
            _warn_when_built(optimizer, frozen)


def _is_outdated(model):
    """Whether the slots of the model's optimizer do not match its trainable variables."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or not optimizer.built:
        return False
    optimized = {id(v) for v in compat.optimized_variables(optimizer)}
    return optimized != {id(v) for v in model.trainable_variables}


def _renew_before_training(model):
    """Replaces the optimizer of a model, such as a loaded one, when its train function is made.

    Keras calls a model symbolically before it trains, and no variable can be created then.
    """
    make = model.make_train_function

    @functools.wraps(make)
    def renew_and_make(*args, **kwargs):
        vars(model).pop("make_train_function", None)
        if _is_outdated(model):
            compat.replace_optimizer(model, successor(model.optimizer))
            model.optimizer.build(model.trainable_variables)
        return make(*args, **kwargs)

    vars(model).setdefault("make_train_function", renew_and_make)


def successor(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """A new optimizer, not yet built, that continues from the state of another one.

    When it is built it copies the other's number of iterations, its learning rate, and its state
    of the variables that both optimize, and warns if the other one optimized more of them.
    """
    fresh = type(optimizer).from_config(optimizer.get_config())
    fresh.__dict__["build"] = _ContinuingBuild(fresh, optimizer)
    return fresh


class _ContinuingBuild:
    """The `build` of an optimizer that continues from the state of another one.

    It holds none of the variables that the other one optimized, and of its state what it copies.

    Attributes:
        before: paths of the variables that the other one optimized, with weak references.
        states: variables of the other one, by path and shape.
        owners: the path of the variable that a state is of, by that of the state.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer, other: keras.optimizers.Optimizer):
        self.optimizer = optimizer
        optimized = compat.optimized_variables(other)
        self.before = [(v.path, weakref.ref(v)) for v in optimized]
        counts = Counter(v.path for v in other.variables)
        states = [v for v in other.variables if counts[v.path] == 1]
        self.states = {(v.path, tuple(v.shape)): v for v in states}
        names = {v.path.replace("/", "_"): v.path for v in optimized}
        self.owners = {v.path: _owner(v.path, names) for v in states}

    def release(self, paths: Collection[str]) -> None:
        """Drops the state of variables that are gone."""
        kept = {key: v for key, v in self.states.items() if self.owners[key[0]] not in paths}
        self.states = kept

    def __call__(self, variables: list[keras.Variable]) -> None:
        """Builds the optimizer, once, and copies the state."""
        del self.optimizer.__dict__["build"]
        self.optimizer.build(variables)
        _warn_of_frozen(self.before, variables)
        for variable in self.optimizer.variables:
            found = self.states.get((variable.path, tuple(variable.shape)))
            if found is not None:
                # A copy, because training donates the arrays of this one.
                variable.assign(jnp.copy(found.value))


def _is_successor(optimizer: Any) -> bool:
    return isinstance(getattr(optimizer, "__dict__", {}).get("build"), _ContinuingBuild)


def _owner(path: str, names: Mapping[str, str]) -> str | None:
    """The variable that a state is of: Keras begins its name with the path of the variable."""
    name = path.rpartition("/")[2]
    while name and name not in names:
        name = name.rpartition("_")[0]
    return names.get(name)


def _warn_of_frozen(
    before: Sequence[tuple[str, weakref.ref[keras.Variable]]], variables: list[keras.Variable]
) -> None:
    """Warns if training continues without some variables that were trained before."""
    left = {id(v) for v in variables}
    frozen = [path for path, variable in before if id(variable()) not in left]
    if frozen:
        warnings.warn(
            f"The model was compiled before {len(frozen)} of its {len(before)} trainable variables "
            f"were quantized or frozen ({_shown(frozen)}). Training continues with the state of "
            f"its optimizer, for the {len(variables)} trainable variables it has now. Compile it "
            "again to start with a new optimizer.",
            stacklevel=3,
        )


class _WarningBuild:
    """The `build` of an optimizer whose model was compiled before some layers were quantized.

    Attributes:
        frozen: paths of variables that were trainable when the model was compiled.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer):
        self.optimizer = optimizer
        self.frozen: list[str] = []

    def __call__(self, variables: list[keras.Variable]) -> None:
        """Builds the optimizer, once, and warns."""
        del self.optimizer.__dict__["build"]
        self.optimizer.build(variables)
        warnings.warn(
            f"The model was compiled before {len(self.frozen)} of its variables were quantized "
            f"({_shown(self.frozen)}). They no longer train; the {len(variables)} trainable "
            "variables it has now do. Compile it after quantizing to train those without this "
            "warning.",
            stacklevel=2,
        )


def _warn_when_built(optimizer, frozen):
    """Adds to what an optimizer warns of when it is built; a successor warns by itself."""
    vars(optimizer).setdefault("build", _WarningBuild(optimizer)).frozen += frozen


def _shown(paths):
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
