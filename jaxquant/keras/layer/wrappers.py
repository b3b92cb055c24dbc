"""Wrappers of the `build` and `quantize` methods of Keras layers and subclasses."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras

from .. import compat
from ..configs import SchemeConfig, as_config, config_of_policy
from .aliases import alias, check_reachable
from .other_layers import check_other_layers
from .policy import check_compute_dtype

# By mode: (layer, config) -> None, quantizes the whole model that is being quantized in place.
MODES_WITH_DATA: dict[str | None, Callable[[Any, Any], None]] = {}


def own_policy(layer: Any) -> Any:
    """The layer's own dtype policy, also if it was given a map of policies."""
    policy = layer.dtype_policy
    is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
    return policy[layer.path] if is_map and layer.path else policy


def build_in_float(layer: Any, build: Callable[..., Any]) -> Callable[..., Any]:
    """Runs Keras' `build` on its float path: `add_weight` creates the codes and scales."""

    @functools.wraps(build)
    def wrapped(*args, **kwargs):
        state = layer.weight_state
        state.is_building = True
        try:
            built = build(*args, **kwargs)
        finally:
            state.is_building = False
        for name, stored in state.stored_weights.items():
            check_reachable(layer, name, stored.codes)
            alias(layer, stored.codes, name)
        # Float weights under a quantized policy: the layer trains in float8.
        config = layer.quantization_config
        if layer.quantization_mode is not None and config is not None and config.is_training:
            layer.start_training(config)
        return built

    return wrapped


def quantize_with_config(layer: Any) -> Callable[..., Any]:
    """Passes the default configs of jaxquant to Keras' `quantize`, in every version of Keras."""
    quantize = compat.checked_quantize(layer)

    @functools.wraps(quantize)
    def wrapped(mode=None, config=None, **kwargs):
        policy = own_policy(layer)
        is_named = config is None and mode is not None and mode == policy.quantization_mode
        try:
            config = config_of_policy(policy) if is_named else as_config(mode, config)
            with_data = MODES_WITH_DATA.get(getattr(config, "mode", None))
            if with_data is not None:
                return with_data(layer, config)
            if isinstance(config, SchemeConfig):
                check_compute_dtype(layer, config.mode)
                check_other_layers(layer, config)
            with _training_ends(layer, config):
                return quantize(mode=mode, config=config, **kwargs)
        except AttributeError as error:
            # Keras' Model.quantize swallows this error, as if the layer had no `quantize`.
            raise RuntimeError(f"quantize({mode!r}, {config!r}) failed: {error}") from error

    return wrapped


@contextlib.contextmanager
def _training_ends(layer, config) -> Iterator[None]:
    """Allows quantizing a layer after float8 training: its weights are still float."""
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
