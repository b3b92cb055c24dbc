"""How arrays are to be quantized: configs of one array, and of a product's two operands."""

import dataclasses

import jax
import jax.numpy as jnp

from .formats import FP8_E4M3, INT4, INT8, MXFP4, MXFP8, NF4, NVFP4, Format
from .ranges import AbsMax, Range

Axes = int | tuple[int, ...] | None

SCALE_DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e8m0fnu")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayConfig:
    """How to quantize one array. A pytree without leaves, hence static under `jit`.

    Attributes:
        format: number format of the codes.
        axis: the axis, or axes, along which elements share a scale: a kernel's contracted
            axes. None for all axes (per tensor).
        group_size: elements per scale along `axis`: one number for every axis in it or one
            each; None for the whole axis, or what the format prescribes.
        symmetric: whether codes have no zero point. Only formats of whole numbers can.
        range: which part of a group the codes span: AbsMax(), Percentile(p), MinMSE().
        value_range: (qmin, qmax) in place of the format's; whole numbers within its dtype.
        scale_dtype: dtype of the stored scales, one of `SCALE_DTYPES`; None for what the format
            prescribes. Those of "float8_e4m3fn" are a QTensor under one float32 scale. "float16"
            holds scales of 6e-8 to 65504: smaller ones become 6e-8, larger ones NaN.

    Raises:
        ValueError: a field is out of its range, or two fields contradict each other.
    """

    format: Format = INT8
    axis: Axes = 0
    group_size: int | tuple[int | None, ...] | None = None
    symmetric: bool = True
    range: Range = AbsMax()  # noqa: RUF009 (frozen, so one instance serves all)
    value_range: tuple[int, int] | None = None
    scale_dtype: str | None = None

    def __post_init__(self):
        if not isinstance(self.format, Format):
            raise ValueError(f"format must be a Format such as jaxquant.INT8; got {self.format!r}.")
        self._check_groups()
        if not (self.symmetric or self.format.rounds):
            raise ValueError(
                "symmetric=False needs a format of whole numbers, such as INT8 or INT4; got "
                f"format={self.format}. Its zero is exact already: leave symmetric=True."
            )
        if not callable(self.range) or isinstance(self.range, type):
            raise ValueError(
                f"range must be AbsMax(), Percentile(p) or MinMSE(); got {self.range!r}."
            )
        if self.value_range is not None:
            self._check_value_range(self.value_range)
        qmin, qmax = self.bounds
        is_nonnegative = self.format.codebook is not None and qmin == 0
        if self.symmetric and not (qmin < 0 < qmax or is_nonnegative):
            raise ValueError(
                f"Symmetric codes must have zero inside; got {qmin} to {qmax}. Widen the range, "
                "or pass symmetric=False."
            )
        is_name = isinstance(self.stored_scale_dtype, str)
        if not is_name or self.stored_scale_dtype not in SCALE_DTYPES:
            raise ValueError(
                f"scale_dtype must be one of {', '.join(SCALE_DTYPES)}, or None for what the "
                f"format prescribes; got {self.stored_scale_dtype!r}."
            )

    def _check_groups(self):
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        is_index = all(_is_int(a) for a in axes) or self.axis is None
        if not is_index or len(set(axes)) < len(axes):
            raise ValueError(
                "axis must be an int, a tuple of distinct ints, or None for all axes; got "
                f"{self.axis!r}."
            )
        sizes = self.group_size if isinstance(self.group_size, tuple) else (self.group_size,)
        if any(s is not None and (not _is_int(s) or s < 1) for s in sizes):
            raise ValueError(
                "group_size must be a positive int, None for the whole axis, or a tuple of "
                f"these; got {self.group_size!r}."
            )
        is_each = isinstance(self.group_size, tuple)
        if is_each and (self.axis is None or len(sizes) != len(axes)):
            raise ValueError(
                f"group_size must be one int, or one per axis; got {self.group_size} for axis "
                f"{self.axis}."
            )
        prescribed = self.format.group_size
        if prescribed is None:
            return
        if self.group_size not in (None, prescribed):
            raise ValueError(
                f"{self.format} has groups of {prescribed}; got group_size={self.group_size}. "
                "Leave it None, or choose a format without a group size."
            )
        if self.axis is None or len(axes) != 1:
            raise ValueError(f"{self.format} has groups along one axis; got axis={self.axis}.")

    def _check_value_range(self, value_range):
        if not self.format.rounds:
            raise ValueError(
                "value_range needs a format of whole numbers, such as INT8; got "
                f"format={self.format}. Leave it None."
            )
        info = jnp.iinfo(self.format.dtype)
        is_pair = isinstance(value_range, tuple) and len(value_range) == 2
        is_whole = is_pair and all(_is_int(q) for q in value_range)
        if not (is_whole and info.min <= value_range[0] < value_range[1] <= info.max):
            raise ValueError(
                "value_range must be a tuple of two ascending ints within "
                f"[{info.min}, {info.max}] for {self.format}; got {value_range!r}."
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """(qmin, qmax): the outermost codes in use."""
        return self.value_range or (self.format.qmin, self.format.qmax)

    @property
    def reach(self) -> float:
        """The code on which abs-max puts the largest magnitude of a symmetric array."""
        qmin, qmax = self.bounds
        return min(-qmin, qmax) if qmin < 0 else qmax

    @property
    def stored_scale_dtype(self) -> str:
        """Name of the dtype that scales are stored in."""
        return self.scale_dtype or self.format.scale_dtype

    def axes(self, ndim: int) -> tuple[int, ...]:
        """The axes of an array of `ndim` axes along which elements share a scale, from 0 up.

        Raises:
            ValueError: an axis is out of range, or named twice.
        """
        if self.axis is None:
            return tuple(range(ndim))
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        if any(not -ndim <= a < ndim for a in axes):
            raise ValueError(
                f"axis must lie in -{ndim} .. {ndim - 1} for an array of {ndim} axes; got "
                f"axis={self.axis}."
            )
        found = tuple(a % ndim for a in axes)
        if len(set(found)) < len(axes):
            raise ValueError(
                f"axis must name distinct axes of the array; got axis={self.axis} for {ndim} axes."
            )
        return found


def _is_int(x):
    """Whether x is an int, and not True or False."""
    return isinstance(x, int) and not isinstance(x, bool)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Scheme:
    """How to quantize the two operands of a product: `weights`, and `inputs` that meet them.

    Attributes:
        weights: config of the array that is quantized once.
        inputs: config of the other operand, quantized anew in each product; None leaves it as
            it is. Its `axis` only says per tensor (None) or not: the scale is shared along
            the axes that the product contracts, whichever these are.
    """

    weights: ArrayConfig = ArrayConfig(axis=-2)
    inputs: ArrayConfig | None = None

    def __post_init__(self):
        if not isinstance(self.weights, ArrayConfig):
            raise ValueError(f"weights must be an ArrayConfig; got {self.weights!r}.")
        if not isinstance(self.inputs, ArrayConfig | None):
            raise ValueError(f"inputs must be an ArrayConfig or None; got {self.inputs!r}.")


_INT8_WEIGHTS = ArrayConfig(format=INT8, axis=-2)
_INT4_WEIGHTS = ArrayConfig(format=INT4, axis=-2, group_size=128)
_INT8_INPUTS = ArrayConfig(format=INT8, axis=-1)

W8A8 = Scheme(_INT8_WEIGHTS, _INT8_INPUTS)
W8A16 = Scheme(_INT8_WEIGHTS)
W4A16 = Scheme(_INT4_WEIGHTS)
W4A16_ASYM = Scheme(dataclasses.replace(_INT4_WEIGHTS, symmetric=False))
W4A8 = Scheme(_INT4_WEIGHTS, _INT8_INPUTS)
FP8 = Scheme(ArrayConfig(format=FP8_E4M3, axis=-2), ArrayConfig(format=FP8_E4M3, axis=-1))
NF4A16 = Scheme(ArrayConfig(format=NF4, axis=-2, group_size=64))
MXFP8A8 = Scheme(ArrayConfig(format=MXFP8, axis=-2), ArrayConfig(format=MXFP8, axis=-1))
MXFP4A16 = Scheme(ArrayConfig(format=MXFP4, axis=-2))
NVFP4A16 = Scheme(ArrayConfig(format=NVFP4, axis=-2))

SCHEMES = {
    "W8A8": W8A8,
    "W8A16": W8A16,
    "W4A16": W4A16,
    "W4A16_ASYM": W4A16_ASYM,
    "W4A8": W4A8,
    "FP8": FP8,
    "NF4A16": NF4A16,
    "MXFP8A8": MXFP8A8,
    "MXFP4A16": MXFP4A16,
    "NVFP4A16": NVFP4A16,
}
