"""Keras quantizers as thin wrappers over `ArrayConfig`, for stock layers too."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import keras

from ..core import (
    INT8,
    AbsMax,
    ArrayConfig,
    Format,
    Percentile,
    Range,
    check_axis,
    quantize,
    quantize_with_scale,
    scale_values,
)
from .bases import KerasQuantizer


class Quantizer(KerasQuantizer):
    """Base class for quantizers that choose a range.

        codes = clip(round(x * scale))        scale = value_range[1] / high

    A subclass defines `range`, a frozen callable as for `jaxquant.ArrayConfig`: the part of each
    group that the codes span. Calling a quantizer returns codes and the scale that multiplies x,
    as stock Keras layers expect.

    Args:
        axis: axis, or axes, along which elements share a scale, unless the caller names others.
        value_range: (qmin, qmax), the outermost codes.
        output_dtype: dtype of the codes when called. Keras holds 4-bit codes in int8 too.

    Example:
        >>> class HalfRange(jk.Quantizer):
        ...     @property
        ...     def range(self):
        ...         return jq.Percentile(75.0)
        >>> codes, scale = HalfRange()(jnp.array([[0.0, 1.0, 2.0, 3.0, 40.0]]))
        >>> codes.tolist()
        [[0, 42, 85, 127, 127]]
    """

    def __init__(
        self,
        axis: int | tuple[int, ...] | None = -1,
        value_range: tuple[int, int] = (-127, 127),
        output_dtype: str = "int8",
    ):
        super().__init__(output_dtype=output_dtype)
        # Tuples come back from JSON as lists.
        self.axis: Any = _as_axes(axis)
        check_axis(self.axis)
        self.value_range: tuple[int, int] = _as_pair(value_range)
        _check_holds_codes(output_dtype)
        self.array_config()

    @property
    def range(self) -> Range:
        """The part of each group that the codes span."""
        raise NotImplementedError(f"{type(self).__name__} must define `range`.")

    def array_config(self, format: Format = INT8) -> ArrayConfig:
        """The config that quantizes as this quantizer does, in a format that holds its codes.

        Raises:
            ValueError: the value range does not fit the format.
        """
        return ArrayConfig(format=format, range=self.range, value_range=self.value_range)

    def __call__(
        self, x: jax.Array, axis: Any = None, to_numpy: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Returns codes in `output_dtype`, and the scale that multiplies x, with its rank.

        The scale has the dtype of x, as stock layers expect. The codes are rounded with it.
        """
        config, axis = self.array_config(), self.axis if axis is None else _as_axes(axis)
        x = jnp.asarray(keras.ops.convert_to_tensor(x))
        step = scale_values(quantize(x, config, axis).scale)
        # The scale of small values overflows float16.
        scale = jnp.minimum(1 / step, float(jnp.finfo(x.dtype).max)).astype(x.dtype)
        q = quantize_with_scale(x, 1 / scale.astype(step.dtype), None, config)
        return q.codes.astype(self.output_dtype), scale

    def get_config(self) -> dict[str, Any]:
        """The arguments, for Keras' serialization."""
        names = ("axis", "value_range", "output_dtype")
        return {name: getattr(self, name) for name in names}


def _as_axes(axis):
    """Axes as an int, a tuple or None; tuples come back from JSON as lists."""
    return tuple(axis) if isinstance(axis, list | tuple) else axis


def _as_pair(value_range):
    if not isinstance(value_range, list | tuple) or len(value_range) != 2:
        raise ValueError(
            f"value_range must be a pair (qmin, qmax), such as (-127, 127); got {value_range!r}."
        )
    low, high = value_range
    return low, high


def _check_holds_codes(output_dtype):
    if output_dtype not in _CODE_DTYPES:
        raise ValueError(
            f"output_dtype must be one of {', '.join(_CODE_DTYPES)}; got {output_dtype!r}."
        )


_CODE_DTYPES = ("int8", "int4", "int16", "int32")


@keras.saving.register_keras_serializable(package="jaxquant")
class AbsMaxQuantizer(Quantizer):
    """Maps the largest magnitude of each group to the outermost code. See `Quantizer`.

    Example:
        >>> codes, scale = jk.AbsMaxQuantizer()(jnp.array([[1.0, -0.5, 0.25]]))
        >>> codes.tolist(), scale.tolist()
        ([[127, -64, 32]], [[127.0]])

    Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1.
    """

    @property
    def range(self) -> Range:
        """From -max|x| to max|x|."""
        return AbsMax()


@keras.saving.register_keras_serializable(package="jaxquant")
class PercentileQuantizer(Quantizer):
    """Maps the p-th percentile of |x| in each group to the outermost code. See `Quantizer`.

    Args:
        percentile: p, above 50 and at most 100. Larger values are clipped.
        axis, value_range, output_dtype: as for `Quantizer`.

    Example:
        >>> codes, scale = jk.PercentileQuantizer(75.0)(jnp.array([[0.0, 1.0, 2.0, 3.0, 40.0]]))
        >>> codes.tolist()
        [[0, 42, 85, 127, 127]]

    Source: Wu et al. 2020, arXiv:2004.09602, section 5.2.
    """

    def __init__(self, percentile: float = 99.9, **kwargs: Any):
        self.percentile = percentile
        super().__init__(**kwargs)

    @property
    def range(self) -> Range:
        """From minus to plus the percentile."""
        return Percentile(self.percentile)

    def get_config(self) -> dict[str, Any]:
        """The arguments, for Keras' serialization."""
        return {"percentile": self.percentile, **super().get_config()}


@dataclasses.dataclass(frozen=True)
class QuantizerRange:
    """The range that another Keras quantizer chooses, computed from its scale.

    Attributes:
        quantizer: (x, axis=...) -> codes, scale that multiplies x.
        qmax: the code of the outermost value.
    """

    quantizer: Any
    qmax: float

    def __call__(
        self, groups: jax.Array, axes: tuple[int, ...], symmetric: bool, error: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (low, high)."""
        _, scale = self.quantizer(groups, axis=axes)
        high = self.qmax / jnp.asarray(scale, groups.dtype)
        return -high, high


def as_array_config(quantizer: Any, format: Format) -> ArrayConfig:
    """The config that quantizes as a Keras quantizer does.

    Raises:
        ValueError: it is not a quantizer, its range does not fit the format, or its codes are not
            clip(round(x * scale)).
    """
    if isinstance(quantizer, Quantizer):
        return quantizer.array_config(format)
    if not isinstance(quantizer, keras.quantizers.Quantizer):
        raise ValueError(
            f"A quantizer must be a keras.quantizers.Quantizer; got {quantizer!r}. Use "
            "jaxquant.keras.AbsMaxQuantizer(), or derive one from jaxquant.keras.Quantizer."
        )
    given = getattr(quantizer, "value_range", (int(format.qmin), int(format.qmax)))
    low, high = _as_pair(given)
    if type(quantizer) is keras.quantizers.AbsMaxQuantizer:
        return ArrayConfig(format=format, value_range=(low, high))
    chosen = QuantizerRange(quantizer, min(-low, high))
    config = ArrayConfig(format=format, range=chosen, value_range=(low, high))
    _check_rounding(quantizer, low, high)
    return config


def _check_rounding(quantizer, low, high):
    """Checks that a quantizer's codes follow from its scale, the only part that is used."""
    x = jax.random.normal(jax.random.key(0), (4, 64))
    try:
        codes, scale = (jnp.asarray(y, jnp.float32) for y in quantizer(x, axis=-1))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{type(quantizer).__name__} must be called as quantizer(x, axis=-1) and return "
            f"(codes, scale); got {error!r} for x of shape {x.shape}. Derive it from "
            "jaxquant.keras.Quantizer, and define its `range`."
        ) from error
    fits = codes.shape == x.shape and scale.shape == (4, 1)
    # At most half a step, except for the rounding of x * scale.
    off = jnp.abs(codes - jnp.clip(x * scale, low, high)).max() if fits else jnp.inf
    if not off <= 0.501:
        raise ValueError(
            f"{type(quantizer).__name__} must return (codes, scale) with codes = clip(round(x * "
            f"scale), {low}, {high}); got codes of shape {codes.shape} and a scale of shape "
            f"{scale.shape} for x of shape {x.shape}, and codes that are {off:.3g} away from "
            "x * scale. Derive it from jaxquant.keras.Quantizer, and define its `range`."
        )
