"""Optimizers of models in which trainable variables are added or removed."""

import functools
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
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


def renew_optimizers(models: Iterable[keras.Model], frozen: Sequence[str] = ()) -> None:
    """Replaces optimizers that hold slots for variables that are gone.

    Optimizers that are not built yet have no slots: they warn when they are built.

    Args:
        models: models of a layer; the one that is being quantized is among them.
        frozen: paths of trainable variables of the layer that were quantized.
    """
    for model in {*models, *compat.model_being_quantized()}:
        if _has_slots(model):
            _renew_optimizer(model)
        elif frozen and getattr(model, "optimizer", None) is not None:
            _warn_when_built(model.optimizer, frozen)


def _has_slots(model):
    optimizer = getattr(model, "optimizer", None)
    return optimizer is not None and optimizer.built


def _is_outdated(model):
    """Whether the slots of the model's optimizer do not match its trainable variables."""
    return _has_slots(model) and not compat.has_slots_for(
        model.optimizer, model.trainable_variables
    )


def _renew_optimizer(model):
    model.optimizer = successor(model.optimizer)
    model.train_function = None


def _renew_before_training(model):
    """Replaces the optimizer of a model, such as a loaded one, when its train function is made.

    Keras calls a model symbolically before it trains, and no variable can be created then.
    """
    make = model.make_train_function

    @functools.wraps(make)
    def renew_and_make(*args, **kwargs):
        vars(model).pop("make_train_function", None)
        if _is_outdated(model):
            _renew_optimizer(model)
            model.optimizer.build(model.trainable_variables)
        return make(*args, **kwargs)

    vars(model).setdefault("make_train_function", renew_and_make)


def successor(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """A new optimizer, not yet built, that continues from the state of another one.

    When it is built it copies the other's number of iterations, its learning rate, and its state
    of the variables that both optimize, and warns if the other one optimized more of them.
    """
    fresh = type(optimizer).from_config(optimizer.get_config())
    build, held = fresh.build, optimizer.variables
    before = compat.optimized_variables(optimizer)

    @functools.wraps(build)
    def build_and_copy(variables):
        del fresh.__dict__["build"]
        build(variables)
        _warn_of_frozen(before, variables)
        counts = Counter(v.path for v in held)
        values = {(v.path, tuple(v.shape)): v for v in held if counts[v.path] == 1}
        for variable in fresh.variables:
            found = values.get((variable.path, tuple(variable.shape)))
            if found is not None:
                # A copy, because training donates the arrays of this one.
                variable.assign(jnp.copy(found.value))

    fresh.__dict__["build"] = build_and_copy
    return fresh


def _warn_of_frozen(before: list[keras.Variable], variables: list[keras.Variable]) -> None:
    """Warns if training continues without some variables that were trained before."""
    left = {id(v) for v in variables}
    frozen = [v.path for v in before if id(v) not in left]
    if frozen:
        warnings.warn(
            f"The model was compiled before {len(frozen)} of its {len(before)} trainable variables "
            f"were quantized or frozen ({_shown(frozen)}). Training continues with the state of "
            f"its optimizer, for the {len(variables)} trainable variables it has now. Compile it "
            "again to start with a new optimizer.",
            stacklevel=2,
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
    build = vars(optimizer).setdefault("build", _WarningBuild(optimizer))
    if isinstance(build, _WarningBuild):
        build.frozen += frozen


def _shown(paths):
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
