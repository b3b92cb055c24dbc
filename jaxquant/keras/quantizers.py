"""Keras quantizers as thin wrappers over `ArrayConfig`, for our layers and for stock ones."""

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
)


class Quantizer(keras.quantizers.Quantizer):
    """Base class for quantizers that choose a range; rounding is the library's.

        codes = clip(round(x * scale))        scale = value_range[1] / high

    A subclass gives `range`: a frozen callable as `jaxquant.ArrayConfig` takes it, which says
    which part of each group the codes span. Called, it returns codes and a scale that
    multiplies, as quantizers of stock Keras layers do.

    Args:
        axis: axis, or axes, along which elements share a scale, where the caller names none.
        value_range: (qmin, qmax), the outermost codes.
        output_dtype: dtype of the codes when called; Keras keeps those of 4 bits in int8 too.
    """

    def __init__(
        self,
        axis: int | tuple[int, ...] | None = -1,
        value_range: tuple[int, int] = (-127, 127),
        output_dtype: str = "int8",
    ):
        super().__init__(output_dtype=output_dtype)
        # JSON has lists in the place of tuples.
        self.axis = _as_axes(axis)
        check_axis(self.axis)
        self.value_range = _as_pair(value_range)
        _check_holds_codes(output_dtype)
        self.array_config()

    @property
    def range(self) -> Range:
        """Which part of each group the codes span."""
        raise NotImplementedError(f"{type(self).__name__} must define `range`.")

    def array_config(self, format: Format = INT8) -> ArrayConfig:
        """The config that quantizes as this does, in a format that holds its codes.

        Raises:
            ValueError: the format does not hold the value range.
        """
        return ArrayConfig(format=format, range=self.range, value_range=self.value_range)

    def __call__(
        self, x: jax.Array, axis: Any = None, to_numpy: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Returns codes in `output_dtype` and the scale that multiplies, in the rank of x.

        The scale has the dtype of x, as stock layers expect, and the codes are those that go
        with it.
        """
        config, axis = self.array_config(), self.axis if axis is None else _as_axes(axis)
        x = jnp.asarray(keras.ops.convert_to_tensor(x))
        step = quantize(x, config, axis).scale
        # Small groups have scales that float16 cannot hold.
        scale = jnp.minimum(1 / step, float(jnp.finfo(x.dtype).max)).astype(x.dtype)
        q = quantize_with_scale(x, 1 / scale.astype(step.dtype), None, config)
        return q.codes.astype(self.output_dtype), scale

    def get_config(self) -> dict[str, Any]:
        """The arguments, for Keras' serialization."""
        names = ("axis", "value_range", "output_dtype")
        return {name: getattr(self, name) for name in names}


def _as_axes(axis):
    """JSON has lists in the place of tuples."""
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
    """The largest magnitude of each group lands on the outermost code. See `Quantizer`.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1.
    """

    @property
    def range(self) -> Range:
        """Spans every element."""
        return AbsMax()


@keras.saving.register_keras_serializable(package="jaxquant")
class PercentileQuantizer(Quantizer):
    """The p-th percentile of |x| in each group lands on the outermost code. See `Quantizer`.

    Args:
        percentile: p, above 50 and at most 100; what is beyond it is clipped.
        axis, value_range, output_dtype: as for `Quantizer`.

    Source: Wu et al. 2020, arXiv:2004.09602, section 5.2.
    """

    def __init__(self, percentile: float = 99.9, **kwargs: Any):
        self.percentile = percentile
        super().__init__(**kwargs)

    @property
    def range(self) -> Range:
        """Spans up to the percentile."""
        return Percentile(self.percentile)

    def get_config(self) -> dict[str, Any]:
        """The arguments, for Keras' serialization."""
        return {"percentile": self.percentile, **super().get_config()}


@dataclasses.dataclass(frozen=True)
class QuantizerRange:
    """The range that a Keras quantizer of someone else's chooses, read from its scale.

    Attributes:
        quantizer: (x, axis=...) -> codes, scale that multiplies.
        qmax: the code on which the outermost value lands.
    """

    quantizer: Any
    qmax: float

    def __call__(self, groups, axes, symmetric, error):
        """Returns (low, high)."""
        _, scale = self.quantizer(groups, axis=axes)
        high = self.qmax / jnp.asarray(scale, groups.dtype)
        return -high, high


def as_array_config(quantizer: Any, format: Format) -> ArrayConfig:
    """The config that quantizes as a Keras quantizer does, ours or not.

    Raises:
        ValueError: it is no quantizer, its range does not fit the format, or it does more than
            choose a scale: its codes are not clip(round(x * scale)).
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
    """A quantizer is used for its scale, so its codes must be those that the scale gives."""
    x = jax.random.normal(jax.random.key(0), (4, 64))
    try:
        codes, scale = (jnp.asarray(y, jnp.float32) for y in quantizer(x, axis=-1))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{type(quantizer).__name__} must be called as quantizer(x, axis=-1) and return "
            f"(codes, scale); got {error!r} for x of shape {x.shape}. Derive it from "
            "jaxquant.keras.Quantizer, and give its `range`."
        ) from error
    fits = codes.shape == x.shape and scale.shape == (4, 1)
    # Nearest codes are half a step away at most, but for the rounding of x * scale.
    off = jnp.abs(codes - jnp.clip(x * scale, low, high)).max() if fits else jnp.inf
    if not off <= 0.501:
        raise ValueError(
            f"{type(quantizer).__name__} must return (codes, scale) with codes = clip(round(x * "
            f"scale), {low}, {high}); got codes of shape {codes.shape} and a scale of shape "
            f"{scale.shape} for x of shape {x.shape}, and codes that are {off:.3g} away from "
            "x * scale. Derive it from jaxquant.keras.Quantizer, and give its `range`."
        )
