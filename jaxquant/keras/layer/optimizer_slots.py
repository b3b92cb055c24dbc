"""What training needs to know of a layer that is quantized before, after and in between."""

import contextlib
import functools
from collections import Counter
from typing import Any

import jax.numpy as jnp
import keras

from .. import compat
from ..configs import SchemeConfig
from ..files import SavedMixin


class TrainedMixin(SavedMixin):
    """Lets models train before and after their layers gain and lose trainable variables."""

    quantization_config: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer, which learns what model it is in."""
        model = compat.running_layer()
        if isinstance(model, keras.Model) and model not in self.models:
            self.models.add(model)
            if _is_outdated(model):
                _renew_before_training(model)
        return super().__call__(*args, **kwargs)

    def renew_optimizers(self) -> None:
        """Gives optimizers that hold slots for variables that are gone a successor."""
        for model in self.models:
            if _has_slots(model):
                _renew_optimizer(model)

    @property
    def trains_in_float8(self) -> bool:
        """Whether the layer has float weights, and scales by which it trains in float8."""
        config = self.quantization_config
        return compat.has_quantized_variables(self) and config is not None and config.is_training

    def start_training(self, config: SchemeConfig) -> None:
        """Hook: adds what training needs, all of it or nothing.

        Raises:
            NotImplementedError: the layer cannot be trained in this mode.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot train in {config.mode}; got {self.name!r}. Dense and "
            "EinsumDense can. Keep it in float, by filters=..., and quantize it after training."
        )

    def end_training(self) -> None:
        """Hook: drops what `start_training` added."""

    def training_shapes(self) -> list[tuple[int, ...]]:
        """Hook: the shapes of the variables that `start_training` adds."""
        return []


def _has_slots(model):
    optimizer = getattr(model, "optimizer", None)
    return optimizer is not None and optimizer.built


def _is_outdated(model):
    """Whether the model's optimizer has slots for other variables than those it trains."""
    return _has_slots(model) and not compat.has_slots_for(
        model.optimizer, model.trainable_variables
    )


def _renew_optimizer(model):
    model.optimizer = successor(model.optimizer)
    model.train_function = None


def _renew_before_training(model):
    """Renews the optimizer of a model, such as a loaded one, that is called for the first time.

    Not at once, because Keras calls a model symbolically before it trains, and then no variable
    can be made; but when the model makes its train function, next.
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
    """An optimizer that is not built yet, and goes on where another one is.

    Once it is built, it has the other's state of all variables that both optimize, and its
    number of iterations and learning rate.
    """
    fresh = type(optimizer).from_config(optimizer.get_config())
    build, held = fresh.build, optimizer.variables

    @functools.wraps(build)
    def build_and_take_over(variables):
        del fresh.__dict__["build"]
        build(variables)
        counts = Counter(v.path for v in held)
        values = {(v.path, tuple(v.shape)): v for v in held if counts[v.path] == 1}
        for variable in fresh.variables:
            found = values.get((variable.path, tuple(variable.shape)))
            if found is not None:
                # A copy: training donates its arrays, and the other still has its own.
                variable.assign(jnp.copy(found.value))

    fresh.__dict__["build"] = build_and_take_over
    return fresh


@contextlib.contextmanager
def weights_still_float(layer, config):
    """Lets a layer that trained in float8 be quantized, which is no second rounding."""
    if not layer.trains_in_float8 or getattr(config, "is_training", False):
        yield
        return
    compat.mark_quantized(layer, False)
    try:
        yield
    finally:
        compat.mark_quantized(layer)
        if layer.stored_weights:
            layer.end_training()
