"""Every private Keras name that the package uses, and the check of the backend.

Keras has no public alternative to these. Each is tested on the oldest and the newest Keras that
the package supports.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import keras
import numpy as np
from keras.src.backend.common.backend_utils import compute_conv_transpose_padding_args_for_jax
from keras.src.backend.common.global_state import get_global_attribute, set_global_attribute
from keras.src.backend.common.masking import set_keras_mask
from keras.src.backend.common.variables import get_autocast_scope
from keras.src.export import onnx
from keras.src.models.functional import Functional
from keras.src.quantizers.quantization_config import validate_and_resolve_config
from keras.src.quantizers.utils import should_quantize_layer
from keras.src.saving.serialization_lib import SafeModeScope

from .bases import AnyLayer, KerasLayer, KerasVariable

_BACKENDS = ("jax",)
if keras.backend.backend() not in _BACKENDS:
    raise ImportError(
        f"jaxquant.keras computes with JAX; got the backend {keras.backend.backend()!r} of Keras. "
        "Set KERAS_BACKEND=jax in the environment before Keras is imported."
    )


class StoresItsWeights(KerasLayer):
    """A layer whose quantized weights are in variables that Keras' own modes do not know."""

    def _quantization_geometry(self) -> None:
        """Returns None, for which Keras 3.16 lists the layer's largest variable in its summary."""


def has_quantized_variables(layer: AnyLayer) -> bool:
    """Whether Keras treats the layer's variables as those of its quantization mode."""
    return getattr(layer, "_is_quantized", False)


def mark_quantized(layer: AnyLayer, is_so: bool = True) -> None:
    """Tells Keras that the variables fit the mode. Otherwise its policy setter quantizes again."""
    layer._is_quantized = is_so


@contextlib.contextmanager
def unlocked(layer: AnyLayer) -> Iterator[None]:
    """A context in which variables can be added to and removed from a built layer."""
    was_locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if was_locked:
            layer._tracker.lock()


def own_variables(layer: AnyLayer) -> list[keras.Variable]:
    """The layer's variables without those of its sublayers, trainable ones first."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def attributes(layer: AnyLayer) -> dict[str, Any]:
    """The layer's attributes, without Keras' own lists of its variables and layers."""
    own = [layer._trainable_variables, layer._non_trainable_variables, layer._layers]
    return {name: v for name, v in vars(layer).items() if not any(v is x for x in own)}


class GivenVariable(KerasVariable):
    """Reads as a variable that has this array as its value, also while it is traced.

    Keras' constructor would register it with the model that is running.
    """

    def __init__(self, value: jax.Array, name: str):
        self._name = self._path = name
        self._value, self._shape, self._ndim = value, tuple(value.shape), value.ndim
        self._dtype, self._autocast, self._trainable = value.dtype.name, False, False
        self._regularizer = self._constraint = None

    def assign(self, value: Any) -> Any:
        """Raises an error: codes would not change."""
        raise ValueError(
            f"{self.name!r} is quantized and cannot be assigned to; got a value of shape "
            f"{np.shape(value)}. Keep its layer in float with keep=[...]."
        )


def drop_variable(layer: AnyLayer, variable: keras.Variable) -> None:
    """Stops tracking a variable. `del layer.name` also collects garbage, which takes 0.1 s."""
    layer._untrack_variable(variable)


def track_only(layer: AnyLayer, variables: list[keras.Variable]) -> None:
    """Replaces the layer's own variables with these, in this order."""
    tracker = layer._tracker
    for name in ("trainable_variables", "non_trainable_variables"):
        belongs, tracked = tracker.config[name]
        tracked[:] = [v for v in variables if belongs(v)]
        tracker.stored_ids[name] = {id(v) for v in tracked}


def _frame_of(function: Any) -> Any:
    """The frame of a running function, or None."""
    code, frame = getattr(inspect.unwrap(function), "__code__", None), inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def running_quantize() -> Any:
    """The frame of a running `Model.quantize`, or None. It tells layers no model and no filters."""
    return _frame_of(keras.Model.quantize)


def layers_being_quantized() -> list[Any]:
    """The layers that a running `Model.quantize` quantizes, in its order; empty outside of one."""
    frame = running_quantize()
    if frame is None:
        return []
    model, filters = frame.f_locals["self"], frame.f_locals["filters"]
    return [x for x in sublayers(model) if not children(x) and should_quantize_layer(x, filters)]


def model_being_quantized() -> list[Any]:
    """The model of a running `Model.quantize`; empty outside of one."""
    frame = running_quantize()
    return [] if frame is None else [frame.f_locals["self"]]


class NothingToCalibrate:
    """Stands for the blocks of a model in a GPTQConfig or AWQConfig, while Keras quantizes it.

    After the layers, one by one, `Model.quantize` calibrates the layers in these blocks on the
    data set. It finds none, on a data set of one token, and the config is as before.

    Args:
        config: that of the running `Model.quantize`.
        layers: those that are quantized, all at once.
    """

    def __init__(self, config: Any, layers: list[Any]):
        self.config: Any = config
        self.layers: list[Any] = layers
        self.frame: Any = running_quantize()
        # Keras 3.16 reads the blocks before it asks the layers.
        self.structure: dict[str, Any] = self.frame.f_locals.get("structure") or {}
        self.held: dict[str, Any] = dict(vars(config))
        self.held_structure: dict[str, Any] = dict(self.structure)
        blocks = {"pre_block_layers": [], "sequential_blocks": [self]}
        given = {"dataset": [np.zeros(1, np.int32)], "tokenizer": len, "num_samples": 1}
        vars(config).update(given, sequence_length=1, quantization_layer_structure=blocks)
        self.structure.update(blocks)

    def restore(self) -> None:
        """Gives the config and the blocks what they held."""
        vars(self.config).update(self.held)
        self.structure.clear()
        self.structure.update(self.held_structure)

    def _flatten_layers(self) -> list[Any]:
        """What Keras calls to find the layers in a block.

        Raises:
            ValueError: it is another run of `Model.quantize`, which Keras 3.16 starts with this.
        """
        self.restore()
        if running_quantize() is not self.frame:
            raise ValueError(
                f"The config must be as it was; got a {type(self.config).__name__} that an earlier "
                "Model.quantize changed and did not restore, because an error ended it. It is "
                "restored now. Call quantize again."
            )
        report = self.frame.f_locals.get("report")
        if report is not None:
            _report(report, self.layers)
        return []


def _report(report: Any, layers: list[Any]) -> None:
    """Lists layers as quantized in Keras' report, which has found them quantized already."""
    paths = {layer.path or layer.name: layer for layer in layers}
    report.skipped[:] = [(path, why) for path, why in report.skipped if path not in paths]
    known = {path for path, *_ in report.quantized}
    for path, layer in paths.items():
        if path not in known:
            report.add_quantized(path, layer.quantization_mode, layer.dtype_policy.name)


def nothing_to_calibrate(config: Any) -> NothingToCalibrate | None:
    """What stands in a config for the blocks of a model, or None."""
    structure = config.quantization_layer_structure or {}
    found = next(iter(structure.get("sequential_blocks", ())), None)
    return found if isinstance(found, NothingToCalibrate) else None


# Keras writes ONNX from JAX by jax2onnx from 3.15 on.
_ONNX_EXPORTER: Any = getattr(onnx, "_export_onnx_jax", None)


def is_exporting_onnx() -> bool:
    """Whether Keras is tracing a model to write an ONNX file. It does not tell layers."""
    return _frame_of(_ONNX_EXPORTER) is not None


@contextlib.contextmanager
def policies_in_float(layer: AnyLayer) -> Iterator[None]:
    """A context in which quantized sublayers have the policies that they were quantized from."""
    found = [(x, x._dtype_policy) for x in sublayers(layer) if x.quantization_mode is not None]
    for inner, policy in found:
        inner._dtype_policy = keras.dtype_policies.get(policy.name.rpartition("_from_")[2])
    try:
        yield
    finally:
        for inner, policy in found:
            inner._dtype_policy = policy


def check_quantize_arguments(layer: AnyLayer, mode: str | None) -> None:
    """Keras' own check before a layer is quantized: that it is built, and not already quantized.

    Raises:
        ValueError: it is not, or the mode is unknown.
    """
    layer._check_quantize_args(mode, layer.compute_dtype)


def checked_quantize(layer: Any) -> Callable[..., None]:
    """The `quantize` of the layer's class with Keras' checks, which only Keras before 3.16 adds."""

    @functools.wraps(type(layer).quantize.__get__(layer))
    def quantize(mode: str | None = None, config: Any = None, **kwargs: Any) -> None:
        config = validate_and_resolve_config(mode, config)
        check_quantize_arguments(layer, config.mode)
        with unlocked(layer):
            type(layer).quantize(layer, mode=config.mode, config=config, **kwargs)

    return quantize


def call_hook(layer: Any) -> Callable[..., Any]:
    """The method that Keras' guides define for the layer's mode.

    Raises:
        NotImplementedError: there is none, in the words of Keras.
    """
    name = f"_{layer.quantization_mode}_call"
    hook = getattr(layer, name, None)
    if hook is None:
        raise NotImplementedError(
            f"Invalid quantization mode. {type(layer).__name__} must define {name} for the mode "
            f"of its dtype policy; got the mode {layer.quantization_mode!r}."
        )
    return hook


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """A context in which variables are created without values, to be assigned to afterwards."""
    waiting = "uninitialized_variables"  # Keras initializes them when another context ends.
    before = get_global_attribute(waiting)
    set_global_attribute(waiting, [])
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        set_global_attribute(waiting, before or [])


def initialize(variables: list[keras.Variable]) -> None:
    """Gives those variables initial values that have none."""
    for variable in variables:
        if variable._value is None:
            variable._deferred_initialize()


def detached(layer: Any) -> Any:
    """A second layer with the attributes of a built one, and so its variables and sublayers.

    It is not part of the graphs that the first one is in.
    """
    twin = object.__new__(type(layer))
    own = {"_inbound_nodes": [], "_outbound_nodes": []}
    vars(twin).update({**vars(layer), **own})
    return twin


def rename(layer: Any, name: str, path: str | None, variables: list[tuple[Any, str]]) -> None:
    """Gives a layer a name and a path, which its later variables are below, and variables paths."""
    layer.name, layer._path = name, path
    layer._parent_path = path and path.rpartition("/")[0]
    for variable, variable_path in variables:
        variable._path = variable_path


def running_layer() -> keras.layers.Layer | None:
    """The outermost layer, such as a model, that is being called."""
    context = get_global_attribute("current_call_ctx")
    return None if context is None else context.entry_layer


def optimized_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The variables that an optimizer was built for."""
    return list(optimizer._trainable_variables)


def replace_optimizer(model: Any, optimizer: Any) -> None:
    """Replaces the optimizer of a compiled model, also in what `compile` keeps for files."""
    given = getattr(getattr(model, "_compile_config", None), "config", {})
    # Under a mixed policy, Keras wraps the optimizer that it was given.
    is_given = given.get("optimizer") is model.optimizer
    given["optimizer"] = optimizer if is_given else getattr(optimizer, "inner_optimizer", optimizer)
    model.optimizer, model.train_function = optimizer, None


def autocast(x: jax.Array) -> jax.Array:
    """Casts to the dtype of the running layer, as reading a Keras variable does."""
    scope = get_autocast_scope()
    return x if scope is None else scope.maybe_cast(x)


def conv_transpose_padding(layer: Any) -> list[tuple[int, int]]:
    """The padding of a transposed convolution layer, for `lax.conv_transpose`."""
    return compute_conv_transpose_padding_args_for_jax(
        input_shape=(None,) * (layer.rank + 2),
        kernel_shape=(*layer.kernel_size, None, None),
        strides=layer.strides,
        padding=layer.padding,
        output_padding=layer.output_padding,
        dilation_rate=layer.dilation_rate,
    )


def set_mask(x: jax.Array, mask: Any) -> None:
    """Attaches to x the mask of the steps that later layers ignore."""
    if mask is not None:
        set_keras_mask(x, mask)


def with_default_mark(function: Callable[..., Any], inherited: Any) -> Callable[..., Any]:
    """A copy of `get_config`, marked as Keras' default one if `inherited` is.

    Keras uses the mark to find layers that do not define `get_config`, and generates their config.
    """

    @functools.wraps(function)
    def marked(self):
        return function(self)

    vars(marked)["_is_default"] = getattr(inherited, "_is_default", False)
    return marked


def children(layer: AnyLayer) -> list[Any]:
    """The direct sublayers."""
    return list(layer._layers)


def sublayers(layer: AnyLayer) -> list[Any]:
    """The layer and all its sublayers, each once, outer ones first."""
    return list({id(x): x for x in layer._flatten_layers()}.values())


def seeds(layer: AnyLayer) -> list[keras.Variable]:
    """The states of the layer's own random seeds."""
    return [generator.state for generator in layer._seed_generators]


def store_attributes(store: Any) -> Any:
    """The attributes of a layer's group in one HDF5 file; None for any other kind of store."""
    if len(getattr(store, "current_shard_filenames", ())) > 1:
        return None
    return getattr(getattr(store, "_h5_entry_group", None), "attrs", None)


def is_functional(model: keras.Model) -> bool:
    """Whether a model is a graph between inputs and outputs."""
    return isinstance(model, Functional)


def origin(tensor: Any) -> Any:
    """The layer that a symbolic tensor comes from."""
    return tensor._keras_history.operation


def symbolic_calls(layer: AnyLayer) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of the calls of a layer in graphs, with symbolic tensors."""
    return [(node.arguments.args, node.arguments.kwargs) for node in layer._inbound_nodes]


def trusted() -> Any:
    """A context in which code in the configs of layers is accepted."""
    return SafeModeScope(False)
