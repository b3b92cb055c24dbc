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

from ...core import (
    ArrayConfig,
    Axes,
    Inputs,
    QTensor,
    normalize_axes,
    quantize,
    shared_axes,
)
from ...ops import best_order
from .. import compat
from ..files import carriers, from_carriers, to_carriers


class QuantizedWeight:
    """Declares that a weight is quantizable: `kernel = QuantizedWeight(axis=0)`.

    The layer creates it by `add_weight(name="kernel", ...)`, under the name of the attribute.
    Reading the attribute gives the variable, and once the layer is quantized the array that
    its codes stand for, cast like a variable where a layer is running.

    Args:
        axis: the axes along which elements share a scale, those that the layer's product
            contracts; groups of a block size run along the last one named. Or a function of
            the layer, where they depend on its arguments.
        inputs: whether the layer's inputs meet this weight in a product, and so may be
            quantized with it. A table that is only looked up has none.
    """

    def __init__(self, axis: int | tuple[int, ...] | Callable[[Any], Any], inputs: bool = True):
        self.axis = axis
        self.inputs = inputs
        self.name = ""

    def __set_name__(self, owner, name):
        self.name = name

    def axes(self, layer: keras.layers.Layer) -> tuple[int, ...]:
        """The declared axes, for this layer."""
        axis = self.axis(layer) if callable(self.axis) else self.axis
        return axis if isinstance(axis, tuple) else (axis,)

    def __get__(self, layer, owner=None):
        if layer is None:
            return self
        stored = layer.stored_weights.get(self.name)
        if stored is None:
            if self.name not in layer.float_weights:
                raise AttributeError(
                    f"{type(layer).__name__} has no {self.name!r} yet; got a layer with "
                    f"built={layer.built}. Build it, or create the weight by "
                    f"add_weight(name={self.name!r})."
                )
            value = layer.float_weights[self.name]
        else:
            value = compat.autocast(stored.dequantize())
        return layer.adapted(self.name, value)

    def __set__(self, layer, value):
        stored = layer.stored_weights.get(self.name)
        if stored is not None and value is stored.codes:
            return
        name = getattr(value, "name", None)
        if value is not None and name != self.name:
            raise ValueError(
                f"{type(layer).__name__}.{self.name} is declared as a QuantizedWeight, so it "
                f"must be a variable of this name; got {name or value!r}. Create it by "
                f"add_weight(name={self.name!r})."
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
        """The stored weight, in the shape of the codes; within `replaced`, the one given there."""
        given = _given.get().get(id(self.codes))
        if given is not None:
            return given
        return from_carriers([v.value for v in self.variables], self.like)

    def operand(self, dtype: str) -> QTensor | jax.Array:
        """What takes part in a product; an array of the dtype where codes are padded."""
        return (self.dequantize() if self.is_padded else self.tensor()).astype(dtype)

    def dequantize(self) -> jax.Array:
        """The array that the codes stand for."""
        return _dequantize(self.tensor(), self.shape)

    def assign(self, q: QTensor) -> None:
        """Takes over a QTensor with leaves like those of `like`."""
        for variable, held in zip(self.variables, to_carriers(q), strict=True):
            variable.assign(held)


# One compilation for what would be one per operation.
@partial(jax.jit, static_argnames="shape")
def _dequantize(q, shape):
    return q.dequantize()[tuple(slice(n) for n in shape)]


# By the ids of the variables that hold codes. A context variable: each thread has its own.
_given: ContextVar[Mapping[int, QTensor]] = ContextVar("given", default=MappingProxyType({}))


@contextlib.contextmanager
def replaced(weights: Iterable[tuple[StoredWeight, QTensor]]) -> Iterator[None]:
    """A context in which stored weights read as other tensors, such as traced ones."""
    token = _given.set({**_given.get(), **{id(weight.codes): q for weight, q in weights}})
    try:
        yield
    finally:
        _given.reset(token)


def store_weight(
    add_weight: Callable[..., keras.Variable], name: str, shape: tuple[int, ...], like: QTensor
) -> StoredWeight:
    """Creates the variables for one weight of a layer: not trainable, and never cast."""
    names = [name, *_part_names(name, like)]
    variables = []
    for part, held in zip(names, carriers(like), strict=True):
        variables += [
            add_weight(
                name=part,
                shape=held.shape,
                dtype=held.dtype.name,
                initializer="zeros" if part == name else "ones",
                trainable=False,
                autocast=False,
            )
        ]
    return StoredWeight(shape, like, tuple(variables))


def _part_names(name, like):
    scales = jax.tree.leaves(like.scale)
    parts = [f"{name}_scale"] + [f"{name}_scale_scale"] * (len(scales) - 1)
    return parts + [f"{name}_zero"] * (like.zero_point is not None)


def fit_groups(
    shape: tuple[int, ...], axes: tuple[int, ...], config: ArrayConfig
) -> tuple[ArrayConfig, Axes, tuple[int, ...]]:
    """The config and the axes for a weight of `shape`, and the shape that its groups tile.

    Groups hold at most `group_size` elements. They run along the last of `axes`, and where
    that is shorter, along those before it too. An axis longer than a group is padded to whole
    groups, as Keras does for its int4.

    Raises:
        ValueError: an axis is not there, or named twice.
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
        The QTensor, whether x is finite, and the noise of quantization: the norm of the error
        in units of that of x.
    """
    widths = [(0, n - m) for n, m in zip(shape, x.shape, strict=True)]
    q = quantize(jnp.pad(x, widths), config, axis)
    values = q.dequantize()[tuple(slice(n) for n in x.shape)]
    # In units of the largest magnitude, because squares of 1e-20 or 1e20 are no float32.
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
) -> QTensor:
    """Shapes and dtypes of a quantized weight, in the order that products here like best."""
    like = jax.eval_shape(partial(quantize, axis=axis), jax.ShapeDtypeStruct(shape, dtype), config)
    # A kernel of one pixel is still one of a convolution, which keeps its order.
    is_matrix = len(shared_axes(axis, len(shape), config)) == 1
    order = best_order(like, jax.default_backend()) if is_matrix else None
    like = jax.eval_shape(lambda q: q.reorder(order), like)
    return like if inputs is None else dataclasses.replace(like, inputs=Inputs(inputs))
