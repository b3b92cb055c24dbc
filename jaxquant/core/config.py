"""Configs: how to quantize one array, and how to quantize weights and activations."""

import dataclasses

import jax
import jax.numpy as jnp

from .flags import check_flags
from .formats import FP8_E4M3, INT4, INT8, MXFP4, MXFP8, NF4, NVFP4, Format
from .ranges import AbsMax, Range

SCALE_DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e8m0fnu")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayConfig:
    """How to quantize one array. A pytree without leaves, hence static under `jit`.

    The axes along which elements share a scale are not part of the config. They are an argument
    of `quantize` and of the other functions that take a config.

    Attributes:
        format: number format of the codes.
        group_size: elements per scale along those axes: one int for all axes, or a tuple with
            one int per axis. None is the whole axis, or the group size of the format if it has
            one.
        per_tensor: whether the whole array has a single scale, regardless of the axes.
        symmetric: whether the zero point is fixed at zero. Asymmetric quantization
            (`symmetric=False`) needs a format with integer codes.
        range: which part of a group the codes span: AbsMax(), Percentile(p) or MinMSE().
        value_range: (qmin, qmax) that replaces the range of the format: two integers within its
            dtype.
        scale_dtype: dtype of the stored scales, one of `SCALE_DTYPES`; None for the default of
            the format. "float8_e4m3fn" scales are stored as a QTensor with a float32 scale per
            matrix. "float16" represents scales from 6e-8 to 65504: smaller scales become 6e-8,
            larger ones NaN.

    Raises:
        ValueError: a field is invalid, or two fields contradict each other.

    Example:
        >>> config = jq.ArrayConfig(format=jq.INT4, group_size=2)
        >>> jq.quantize(jnp.ones((4, 3)), config, axis=0).scale.shape
        (2, 3)
    """

    format: Format = INT8
    group_size: int | tuple[int | None, ...] | None = None
    per_tensor: bool = False
    symmetric: bool = True
    range: Range = AbsMax()  # noqa: RUF009 (frozen, so it can be shared)
    value_range: tuple[int, int] | None = None
    scale_dtype: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.format, Format):
            raise ValueError(f"format must be a Format such as jaxquant.INT8; got {self.format!r}.")
        check_flags(per_tensor=self.per_tensor, symmetric=self.symmetric)
        self._check_groups()
        if not (self.symmetric or self.format.rounds):
            raise ValueError(
                "symmetric=False needs a format with integer codes, such as INT8 or INT4; got "
                f"format={self.format}, which has no zero point. Leave symmetric=True."
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
                f"symmetric=True needs qmin < 0 < qmax; got {qmin} to {qmax}. Widen the range, or "
                "pass symmetric=False."
            )
        is_name = isinstance(self.stored_scale_dtype, str)
        if not is_name or self.stored_scale_dtype not in SCALE_DTYPES:
            raise ValueError(
                f"scale_dtype must be the name of a dtype, one of {', '.join(SCALE_DTYPES)}, or "
                f"None for the default of the format; got {self.stored_scale_dtype!r}."
            )

    def _check_groups(self):
        sizes = self.group_size if isinstance(self.group_size, tuple) else (self.group_size,)
        if any(s is not None and (not _is_int(s) or s < 1) for s in sizes):
            raise ValueError(
                "group_size must be a positive int, None for the whole axis, or a tuple of "
                f"these; got {self.group_size!r}."
            )
        prescribed = self.format.group_size
        if prescribed is not None and self.group_size not in (None, prescribed):
            raise ValueError(
                f"{self.format} has a fixed group size of {prescribed}; got "
                f"group_size={self.group_size}. Leave it None, or choose another format."
            )
        if self.per_tensor and (self.group_size or prescribed):
            raise ValueError(
                "per_tensor=True means one scale for the whole array; got groups of "
                f"{self.group_size or prescribed} (format {self.format}). Pass per_tensor=False, "
                "or leave group_size None and choose a format without a fixed group size."
            )

    def _check_value_range(self, value_range):
        if not self.format.rounds:
            raise ValueError(
                "value_range needs a format with integer codes, such as INT8; got "
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
        """(qmin, qmax): the smallest and the largest code in use."""
        return self.value_range or (self.format.qmin, self.format.qmax)

    @property
    def symmetric_qmax(self) -> float:
        """The code that abs-max assigns to the largest magnitude of a symmetric array."""
        qmin, qmax = self.bounds
        return min(-qmin, qmax) if qmin < 0 else qmax

    @property
    def stored_scale_dtype(self) -> str:
        """Name of the dtype in which scales are stored."""
        return self.scale_dtype or self.format.scale_dtype


def _is_int(x: object) -> bool:
    """Whether x is an int but not a bool."""
    return isinstance(x, int) and not isinstance(x, bool)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Scheme:
    """How to quantize weights and activations. A pytree without leaves.

    Attributes:
        weights: config of the weights, which are quantized once.
        inputs: config of the activations, which are quantized in every matrix multiplication,
            with scales shared along the contracted axes. None leaves activations in float.

    Raises:
        ValueError: weights is not an ArrayConfig, or inputs is neither an ArrayConfig nor None.

    Example:
        >>> scheme = jq.Scheme(jq.ArrayConfig(format=jq.INT4), jq.ArrayConfig(format=jq.INT8))
        >>> scheme.weights.format, scheme.inputs.format
        (int4, int8)
    """

    weights: ArrayConfig = ArrayConfig()
    inputs: ArrayConfig | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weights, ArrayConfig):
            raise ValueError(
                f"weights must be an ArrayConfig; got {self.weights!r}. For a format f, pass "
                "ArrayConfig(format=f); for a Scheme s, s.weights."
            )
        if not isinstance(self.inputs, ArrayConfig | None):
            raise ValueError(f"inputs must be an ArrayConfig or None; got {self.inputs!r}.")


_INT8 = ArrayConfig(format=INT8)
_INT4_GROUPS = ArrayConfig(format=INT4, group_size=128)
_E4M3 = ArrayConfig(format=FP8_E4M3)
_MXFP8 = ArrayConfig(format=MXFP8)

W8A8 = Scheme(_INT8, _INT8)
W8A16 = Scheme(_INT8)
W4A16 = Scheme(_INT4_GROUPS)
W4A16_ASYM = Scheme(dataclasses.replace(_INT4_GROUPS, symmetric=False))
W4A8 = Scheme(_INT4_GROUPS, _INT8)
FP8 = Scheme(_E4M3, _E4M3)
NF4A16 = Scheme(ArrayConfig(format=NF4, group_size=64))
MXFP8A8 = Scheme(_MXFP8, _MXFP8)
MXFP4A16 = Scheme(ArrayConfig(format=MXFP4))
NVFP4A16 = Scheme(ArrayConfig(format=NVFP4))

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
