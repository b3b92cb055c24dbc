"""Number formats. To add one, add a constant to this module."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False)
class Format:
    """A number format: the dtype and values of its codes, and the dtype of its scales.

    The library branches on the fields and properties below and never on `name`, so every
    feature supports a new format.

    Attributes:
        name: name for reports and errors, such as "fp8_e4m3".
        dtype: dtype of the codes. XLA stores sub-byte dtypes with two or four codes per byte.
        qmin, qmax: the smallest and the largest value of a code. Abs-max quantization maps the
            largest magnitude to qmax.
        codebook: ascending values that the codes index; None if each code is its own value. Codes
            of a signed dtype are the bits of the index: -8 in int4 is entry 8.
        group_size: elements per scale, if the format fixes it; None leaves it to the config.
        scale_dtype: default dtype of the scales.
        power: 2 or 4 if the codebook is `power_codebook(power, ...)`, whose codes are computed
            instead of searched for, which is faster. None otherwise.

    A codebook that starts at zero is meant for nonnegative arrays. Negative elements become zero.
    Positive elements never do, however small they are relative to the rest of their group.

    Raises:
        ValueError: the name is not a str, JAX does not have the dtype, the dtype cannot represent
            the codes, or the codebook does not match `power`.

    Example:
        >>> int6 = jq.Format("int6", "int8", -31, 31)
        >>> jq.quantize(jnp.array([-1.0, 0.5, 1.0]), jq.ArrayConfig(format=int6)).codes.tolist()
        [-31, 16, 31]
    """

    name: str
    dtype: str
    qmin: float
    qmax: float
    codebook: tuple[float, ...] | None = None
    group_size: int | None = None
    scale_dtype: str = "float32"
    power: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"name must be a str, such as 'int6'; got {self.name!r}.")
        try:
            is_whole = jnp.issubdtype(self.dtype, jnp.integer)
            info = jnp.iinfo(self.dtype) if is_whole else jnp.finfo(self.dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.name}: dtype must be the name of a JAX dtype, such as 'int8'; got "
                f"{self.dtype!r}."
            ) from error
        if self.codebook is not None:
            self._check_codebook(self.codebook, 2**info.bits if is_whole else 0)
        elif not float(info.min) <= self.qmin < self.qmax <= float(info.max):
            raise ValueError(
                f"{self.name}: qmin must be less than qmax, and both within the range of "
                f"{self.dtype}, {info.min} to {info.max}; got {self.qmin} and {self.qmax}."
            )
        if self.power is not None:
            self._check_power(self.codebook or (), self.power)

    def _check_power(self, book, power):
        count = len(book) // 2 if self.has_negative else len(book) - 1
        if (
            power not in (2, 4)
            or count < 1
            or book != power_codebook(power, count, self.has_negative)
        ):
            raise ValueError(
                f"{self.name}: power must be 2 or 4, and the codebook power_codebook(power, ...); "
                f"got {power} and {book}. Leave power None for other codebooks."
            )

    def _check_codebook(self, book, most):
        is_ascending = isinstance(book, tuple) and all(a < b for a, b in itertools.pairwise(book))
        if not is_ascending or not 1 < len(book) <= most:
            raise ValueError(
                f"{self.name}: codebook must be an ascending tuple of at least 2 floats and at "
                f"most {most}, the number of {self.dtype} codes; got {book}."
            )
        if not book[0] <= self.qmin < self.qmax <= book[-1]:
            raise ValueError(
                f"{self.name}: qmin must be less than qmax, and both within the codebook, "
                f"{book[0]} to {book[-1]}; got {self.qmin} and {self.qmax}."
            )

    @property
    def rounds(self) -> bool:
        """Whether codes are rounded to integers. Only such formats support a zero point."""
        return self.codebook is None and jnp.issubdtype(self.dtype, jnp.integer)

    @property
    def has_negative(self) -> bool:
        """Whether the format represents negative values."""
        return self.qmin < 0

    @property
    def has_zero(self) -> bool:
        """Whether the format represents zero, so that zeros come back exactly."""
        return self.codebook is None or 0 in self.codebook

    @property
    def bits(self) -> int:
        """Bits per code in device memory."""
        return bits_of(self.dtype)

    @property
    def dense_bits(self) -> int:
        """Bits that hold every code, as files pack them: 3 for INT3, which memory has as 4."""
        if self.codebook is None and not self.rounds:
            return self.bits
        ends = (self.qmin, self.qmax) if self.codebook is None else (0, len(self.codebook) - 1)
        low, high = map(int, ends)
        if jnp.issubdtype(self.dtype, jnp.signedinteger):
            # Two's complement, in which ~q is -q - 1.
            return 1 + max(high, ~low if low < 0 else low).bit_length()
        return high.bit_length()

    def __repr__(self) -> str:
        return self.name


def power_codebook(power: int, count: int, has_negative: bool) -> tuple[float, ...]:
    """A codebook of (i / count)^power for i from 0 to count, mirrored below zero if asked for.

    It is fine near zero and coarse near one, for values that span many orders of magnitude.
    """
    above = tuple((i / count) ** power for i in range(count + 1))
    return tuple(-v for v in above[:0:-1]) + above if has_negative else above


def bits_of(dtype: jax.typing.DTypeLike) -> int:
    """Bits per element in device memory: 4 for int4, although its itemsize is one byte."""
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return info(dtype).bits


# Quantiles of a normal distribution, including an exact zero. Dettmers et al. 2023,
# arXiv:2305.14314, appendix E.
_NORMAL_FLOAT = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

INT8 = Format("int8", "int8", -127, 127)
INT4 = Format("int4", "int4", -8, 7)
INT2 = Format("int2", "int2", -2, 1)
FP8_E4M3 = Format("fp8_e4m3", "float8_e4m3fn", -448.0, 448.0)
FP8_E5M2 = Format("fp8_e5m2", "float8_e5m2", -57344.0, 57344.0)
NF4 = Format("nf4", "uint4", -1.0, 1.0, codebook=_NORMAL_FLOAT)
# Open Compute Project, Microscaling Formats (MX) v1.0, table 1.
MXFP8 = Format("mxfp8", "float8_e4m3fn", -448.0, 448.0, group_size=32, scale_dtype="float8_e8m0fnu")
MXFP4 = Format("mxfp4", "float4_e2m1fn", -6.0, 6.0, group_size=32, scale_dtype="float8_e8m0fnu")
NVFP4 = Format("nvfp4", "float4_e2m1fn", -6.0, 6.0, group_size=16, scale_dtype="float8_e4m3fn")

FORMATS = {f.name: f for f in (INT8, INT4, INT2, FP8_E4M3, FP8_E5M2, NF4, MXFP8, MXFP4, NVFP4)}

# Formats of other programs' files. Codes of 3, 5 and 6 bits occupy 4 or 8 bits each in memory.
INT3 = Format("int3", "int4", -4, 3)
INT5 = Format("int5", "int8", -16, 15)
INT6 = Format("int6", "int8", -32, 31)
UINT2 = Format("uint2", "uint2", 0, 3)
UINT3 = Format("uint3", "uint4", 0, 7)
UINT4 = Format("uint4", "uint4", 0, 15)
UINT5 = Format("uint5", "uint8", 0, 31)
UINT6 = Format("uint6", "uint8", 0, 63)
UINT8 = Format("uint8", "uint8", 0, 255)
# The values of ggml's IQ4_NL and IQ4_XS, from ggml-common.h.
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
IQ4_NL = Format("iq4_nl", "uint4", -127.0, 113.0, codebook=tuple(map(float, _IQ4_NL)))
# The values of 2-bit and 3-bit codes in ik_llama.cpp (its IQ2_K and IQ3_K), from its ggml-common.h.
IQ2_NL = Format("iq2_nl", "uint2", -31.0, 17.0, codebook=(-31.0, -13.0, 1.0, 17.0))
_IQ3_NL = (-63, -40, -23, -10, 1, 13, 28, 47)
IQ3_NL = Format("iq3_nl", "uint4", -63.0, 47.0, codebook=tuple(map(float, _IQ3_NL)))
# The values of 4-bit floats in bitsandbytes: 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 and negatives.
_BNB_FP4 = tuple(n / 192 for n in (0, 1, 32, 48, 64, 96, 128, 192))
BNB_FP4 = Format(
    "bnb_fp4", "uint4", -1.0, 1.0, codebook=(*(-v for v in _BNB_FP4[:0:-1]), *_BNB_FP4)
)

_OF_FILES = (INT3, INT5, INT6, UINT2, UINT3, UINT4, UINT5, UINT6, UINT8)
_OF_FILES += (IQ2_NL, IQ3_NL, IQ4_NL, BNB_FP4)
FILE_FORMATS = {f.name: f for f in _OF_FILES}
