"""The weights that a layer declares as quantizable, and the variables that hold them."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from ...core import (
    ArrayConfig,
    Axes,
    Inputs,
    QTensor,
    Scheme,
    check_flags,
    normalize_axes,
    quantize,
)
from ...tree.internal import Plan, effective, stored_order
from .. import compat
from ..bases import AnyLayer
from ..files import from_storage_arrays, storage_types, to_storage_arrays

# A property of a weight, or the function of its layer that returns it.
Property = bool | Callable[[Any], bool]


def of_layer(value: Property, layer: AnyLayer) -> bool:
    """The property in this layer."""
    return value(layer) if callable(value) else value


class QuantizedWeight:
    """Declares that a weight is quantizable: `kernel = QuantizedWeight(axis=0)`.

    The layer creates the weight by `self.kernel = self.add_weight(name="kernel", ...)`. Reading
    `layer.kernel` returns the variable, or the dequantized array once the layer is quantized. Like
    a variable, it is cast to the compute dtype while a layer is running.

    Args:
        axis: the axes along which elements share a scale: those that the layer contracts. Groups
            of a block size run along the last one named. Pass a function of the layer if they
            depend on its arguments.
        inputs: whether the layer multiplies its inputs with this weight, so that they can be
            quantized too. False for a table that is only looked up.
        is_matrix: whether the layer multiplies by it as `jaxquant.einsum` does, or convolves with
            a kernel of one pixel, so that codes are stored in the fastest order for that, whatever
            the number of axes; or a function of the layer. False for other kernels of convolutions,
            which keep their order, unless `axis` is one axis.
        has_windows: whether the layer multiplies it with windows of several pixels; or a function
            of the layer. Transforms, such as AWQ, do not support that.
        in_groups: whether the layer multiplies parts of it with parts of its activations, as a
            depthwise convolution does; or a function of the layer. Methods that see activations do
            not support that.

    Example:
        >>> class Projection(jk.QuantizableMixin, keras.layers.Layer):
        ...     kernel = jk.QuantizedWeight(axis=0)
        ...
        ...     def build(self, input_shape):
        ...         self.kernel = self.add_weight(name="kernel", shape=(input_shape[-1], 4))
        ...
        ...     def call(self, inputs):
        ...         return jq.matmul(inputs, self.operand("kernel"))
        >>> layer = Projection()
        >>> layer.build((None, 8))
        >>> layer.quantize("int8")
        >>> layer.quantized_weight("kernel").shape
        (8, 4)
    """

    def __init__(
        self,
        axis: int | tuple[int, ...] | Callable[[Any], Any],
        inputs: bool = True,
        *,
        is_matrix: Property = False,
        has_windows: Property = False,
        in_groups: Property = False,
    ):
        properties = {"is_matrix": is_matrix, "has_windows": has_windows, "in_groups": in_groups}
        check_flags(inputs=inputs, **{k: x for k, x in properties.items() if not callable(x)})
        self.axis = axis
        self.inputs = inputs
        self.is_matrix = is_matrix
        self.has_windows = has_windows
        self.in_groups = in_groups
        self.name: str = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def axes(self, layer: AnyLayer) -> tuple[int, ...]:
        """The declared axes, for this layer."""
        axis = self.axis(layer) if callable(self.axis) else self.axis
        return axis if isinstance(axis, tuple) else (axis,)

    def contracted(self, layer: AnyLayer) -> tuple[int, ...] | None:
        """The declared axes if the weight is a matrix in this layer, as for a `Rule`."""
        return self.axes(layer) if of_layer(self.is_matrix, layer) else None

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            return self
        stored = layer.stored_weights.get(self.name)
        if stored is None:
            if self.name not in layer.float_weights:
                raise AttributeError(
                    f"{type(layer).__name__} has no {self.name!r} yet; got a layer with "
                    f"built={layer.built}. Build it, or create the weight by "
                    f"self.add_weight(name={self.name!r}, ...)."
                )
            value = layer.float_weights[self.name]
        else:
            value = compat.autocast(stored.dequantize())
        return layer.adapted(self.name, value)

    def __set__(self, layer: Any, value: Any) -> None:
        stored = layer.stored_weights.get(self.name)
        if stored is not None and value is stored.codes:
            return
        name = getattr(value, "name", None)
        if value is not None and name != self.name:
            raise ValueError(
                f"{type(layer).__name__}.{self.name} is declared as a QuantizedWeight, so it "
                f"must be a variable of this name; got {name or value!r}. Create it by "
                f"self.add_weight(name={self.name!r}, ...)."
            )
        layer.float_weights[self.name] = value


@dataclasses.dataclass(frozen=True, eq=False)
class StoredWeight:
    """One quantized weight in Keras variables.

    Attributes:
        shape: shape of the weight; that of the codes may be longer along the last declared
            axis, where it is padded with zeros to whole groups.
        like: QTensor of shapes and dtypes.
        variables: one per leaf of `like`, in the order of its leaves, the codes first.
    """

    shape: tuple[int, ...]
    like: QTensor
    variables: tuple[keras.Variable, ...]

    @property
    def codes(self) -> keras.Variable:
        """The variable that holds the codes."""
        return self.variables[0]

    @property
    def is_padded(self) -> bool:
        """Whether the codes are longer than the weight."""
        return self.like.shape != self.shape

    def tensor(self) -> QTensor:
        """The stored weight, in the shape of the codes; inside `replaced`, its replacement.

        Raises:
            ValueError: Keras is writing an ONNX file, which would not be valid with such codes.
        """
        is_int8, inputs = self.like.format.rounds and self.like.format.bits == 8, self.like.inputs
        has_codes = inputs is not None and inputs.config is not None
        if (has_codes or not is_int8) and compat.is_exporting_onnx():
            activations = ", with quantized activations," if has_codes else ""
            raise ValueError(
                f"ONNX files hold int8 codes, with float activations; got {self.like!r}"
                f"{activations} for {self.codes.path}. Quantize the model to jaxquant.W8A16, or "
                "export jaxquant.keras.to_stock(model, dequantize=True)."
            )
        given = _given.get().get(id(self.codes))
        if given is not None:
            return given
        return from_storage_arrays([v.value for v in self.variables], self.like)

    def on_host(self) -> QTensor:
        """`tensor` as NumPy arrays, without a program for its shape; if this process has it."""
        values = [v.value for v in self.variables]
        if not all(x.is_fully_addressable for x in values):
            return self.tensor()
        return from_storage_arrays([np.asarray(x) for x in values], self.like)

    def operand(self, dtype: str) -> QTensor | jax.Array:
        """The weight as an operand; an array of the dtype if its codes are padded."""
        return (self.dequantize() if self.is_padded else self.tensor()).astype(dtype)

    def dequantize(self) -> jax.Array:
        """The dequantized array, in the shape of the weight."""
        return _dequantize(self.tensor(), self.shape)

    def assign(self, q: QTensor) -> None:
        """Copies a QTensor whose leaves have the shapes and dtypes of `like`."""
        for variable, held in zip(self.variables, to_storage_arrays(q), strict=True):
            variable.assign(jax.device_put(held) if isinstance(held, np.ndarray) else held)


# Compiled once instead of operation by operation.
@partial(jax.jit, static_argnames="shape")
def _dequantize(q, shape):
    return effective(q)[tuple(slice(n) for n in shape)]


# Replacements by the ids of the variables that hold codes. Each thread has its own.
_given: ContextVar[Mapping[int, QTensor]] = ContextVar("given", default=MappingProxyType({}))


@contextlib.contextmanager
def replaced(weights: Iterable[tuple[StoredWeight, QTensor]]) -> Iterator[None]:
    """A context in which stored weights are replaced, for example by tracers."""
    token = _given.set({**_given.get(), **{id(weight.codes): q for weight, q in weights}})
    try:
        yield
    finally:
        _given.reset(token)


def store_weight(
    add_weight: Callable[..., keras.Variable], name: str, shape: tuple[int, ...], like: QTensor
) -> StoredWeight:
    """Creates the variables of one weight. They are not trainable and never cast."""
    names = [name, *_part_names(name, like)]
    variables = []
    for part, held in zip(names, storage_types(like), strict=True):
        variables += [
            add_weight(
                name=part,
                shape=held.shape,
                dtype=held.dtype.name,
                initializer=_zeros if part == name else _ones,
                trainable=False,
                autocast=False,
            )
        ]
    return StoredWeight(shape, like, tuple(variables))


# Keras' own would compile a program for each shape.
def _zeros(shape: tuple[int, ...], dtype: Any = None) -> jax.Array:
    return jax.device_put(np.zeros(shape, dtype))


def _ones(shape: tuple[int, ...], dtype: Any = None) -> jax.Array:
    return jax.device_put(np.ones(shape, dtype))


def _part_names(name, like):
    scales = jax.tree.leaves(like.scale)
    parts = [f"{name}_scale"] + [f"{name}_scale_scale"] * (len(scales) - 1)
    parts += [f"{name}_zero"] * (like.zero_point is not None)
    has_multiplier = like.inputs is not None and like.inputs.multiplier is not None
    return parts + [f"{name}_multiplier"] * has_multiplier


def fit_groups(
    shape: tuple[int, ...], axes: tuple[int, ...], config: ArrayConfig
) -> tuple[ArrayConfig, Axes, tuple[int, ...]]:
    """The config and the axes for a weight of `shape`, and the shape that its groups tile.

    Groups hold at most `group_size` elements. They run along the last of `axes`, and if that is
    shorter than a group, along those before it too. An axis longer than a group is padded to a
    multiple of it, as Keras does for its int4.

    Raises:
        ValueError: an axis does not exist, or is named twice.
    """
    axes = normalize_axes(axes, len(shape))
    if config.per_tensor:
        return config, axes, shape
    last, padded = axes[-1], list(shape)
    prescribed = config.format.group_size
    if prescribed is not None:
        padded[last] = -(-shape[last] // prescribed) * prescribed
        return config, last, tuple(padded)
    if not isinstance(config.group_size, int):
        return config, axes, shape
    room, sizes = config.group_size, {}
    for axis in reversed(axes):
        length = max(shape[axis], 1)
        is_cut = axis == last and room < length
        sizes[axis] = room if is_cut else max(d for d in _divisors(length) if d <= room)
        room //= sizes[axis] if sizes[axis] == length else room
    padded[last] = -(-shape[last] // sizes[last]) * sizes[last]
    groups = tuple(sizes[a] for a in axes)
    return dataclasses.replace(config, group_size=groups), axes, tuple(padded)


def _divisors(length):
    return [d for d in range(1, length + 1) if length % d == 0]


@partial(jax.jit, static_argnames=("axis", "shape", "order"))
def quantize_padded(
    x: jax.Array,
    config: ArrayConfig,
    axis: Axes,
    shape: tuple[int, ...],
    order: tuple[int, ...] | None,
) -> tuple[QTensor, jax.Array, jax.Array]:
    """Quantizes x, padded with zeros to `shape`.

    Returns:
        The QTensor, whether x is finite, and the norm of the quantization error relative to that
        of x.
    """
    widths = [(0, n - m) for n, m in zip(shape, x.shape, strict=True)]
    q = quantize(jnp.pad(x, widths), config, axis)
    values = q.dequantize()[tuple(slice(n) for n in x.shape)]
    # In units of the largest magnitude: squares of 1e-20 or 1e20 do not fit float32.
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    error, signal = (jnp.sum(jnp.square(y.astype(jnp.float32) / unit)) for y in (values - x, x))
    noise = jnp.sqrt(error / jnp.where(signal > 0, signal, 1))
    return q.reorder(order), jnp.all(jnp.isfinite(x)), noise


@lru_cache(maxsize=1024)
def abstract_tensor(
    shape: tuple[int, ...],
    dtype: str,
    config: ArrayConfig,
    axis: Axes,
    inputs: ArrayConfig | None,
    multiplier: tuple[int, ...] | None = None,
    contracted: Axes = None,
) -> QTensor:
    """Shapes and dtypes of a quantized weight, in the order that is fastest on this platform.

    Equal arguments give one object.

    Args:
        shape, dtype, config, axis, inputs: as for `quantize` and `Inputs`.
        multiplier: the shape of that of the activations.
        contracted: as for a `Rule`.
    """
    given = jax.ShapeDtypeStruct(shape, dtype)
    order = stored_order(given, Plan(Scheme(config), axis, contracted=contracted))
    like = jax.eval_shape(lambda x: quantize(x, config, axis).reorder(order), given)
    if inputs is None and multiplier is None:
        return like
    held: Any = None if multiplier is None else jax.ShapeDtypeStruct(multiplier, "float32")
    return dataclasses.replace(like, inputs=Inputs(inputs, multiplier=held))
