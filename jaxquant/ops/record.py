"""Records of the computation selected for an operation, which `explain` reads."""

import dataclasses
import math

import jax
import numpy as np

from ..core import QTensor, describe, describe_inputs


@dataclasses.dataclass(frozen=True)
class Choice:
    """The computation selected for a platform.

    Attributes:
        platform: as `jax.lax.platform_dependent` names it; None for all that are not named.
        chip: a generation of TPUs; None for all that are not named.
        implementation: name of the row.
        is_integer: whether it multiplies codes as integers.
        reads_packed: whether it reads sub-byte codes packed, without unpacking them first.
        not_selected: (name of an earlier row, why it is not selected).
        is_partitioned: whether it runs in programs that XLA partitions; otherwise it runs in
            other programs, and in partitioned ones without their own choice.
        on_parts: whether it runs there only where programs have parts (see `has_parts`).
        others_on_parts: what runs instead on parts that it does not support, by the number of
            parts along each stored axis of rhs.
    """

    platform: str | None
    chip: str | None
    implementation: str
    is_integer: bool
    reads_packed: bool
    not_selected: tuple[tuple[str, str], ...]
    is_partitioned: bool = False
    on_parts: bool = False
    others_on_parts: tuple[tuple[tuple[int, ...], "Choice"], ...] = ()


@dataclasses.dataclass(frozen=True)
class OperandRecord:
    """One operand.

    Attributes:
        shape: its logical axes.
        is_quantized: whether it is a QTensor.
        weights, inputs: its description as weights and as activations, such as "int8 per channel"
            and "int8"; for a float array, its dtype.
        dtype: of the float array, or of the dequantized one.
        bytes: in device memory, of codes, scales and zero points.
    """

    shape: tuple[int, ...]
    is_quantized: bool
    weights: str
    inputs: str
    dtype: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Convolution:
    """What a convolution is, beside the shapes of its operands.

    Attributes:
        groups: of channels; each group meets its own kernels.
        channels: of the images.
        pixels: of a window.
    """

    groups: int
    channels: int
    pixels: int


@dataclasses.dataclass(frozen=True, repr=False)
class Record:
    """A product and its selected computations, before batching and loops. Hashable.

    Attributes:
        operation: name of the function of `jax.lax`.
        lhs, rhs: the operands, after `inputs` were applied.
        shape: that of the result.
        result_bytes: bytes of the result.
        length: products that are added for one element of the result.
        rows: rows of inputs, where one matrix on the right multiplies them all; else None.
        choices: one for each platform and chip with its own rows, and one for all others; a second
            one if XLA cannot partition the first.
        is_forced: whether `implementation=` named the row.
        experts: number of matrices on the right, of which each row meets one; None for others.
        convolution: what a convolution is; None for others.
    """

    operation: str
    lhs: OperandRecord
    rhs: OperandRecord
    shape: tuple[int, ...]
    result_bytes: int
    length: int
    rows: int | None
    choices: tuple[Choice, ...]
    is_forced: bool
    experts: int | None = None
    convolution: Convolution | None = None

    def __repr__(self) -> str:
        # Programs are printed with it.
        names = dict.fromkeys(c.implementation for c in self.choices)
        return f"Record({self.operation}, {' or '.join(names)})"


@dataclasses.dataclass(frozen=True)
class Dequantization:
    """A parameter that a lifted function dequantizes. Hashable.

    Attributes:
        path: of the parameter.
        primitive: the operation of JAX that needs a float array.
        why: the reason.
        bytes: of the codes, scales and zero points.
    """

    path: str
    primitive: str
    why: str
    bytes: int


def operand_record(x: jax.Array | np.ndarray | QTensor) -> OperandRecord:
    """Describes an operand by its static properties."""
    dtype = str(np.dtype(x.dtype))
    if not isinstance(x, QTensor):
        return OperandRecord(x.shape, False, dtype, dtype, dtype, x.size * x.dtype.itemsize)
    bare = dataclasses.replace(x, inputs=None)
    words = describe(bare), describe_inputs(bare)
    return OperandRecord(x.shape, True, *words, dtype, bare.nbytes)


def bytes_of(record: Record, copies: tuple[int, int, int]) -> int:
    """Bytes of the operands and of the result, each once."""
    sizes = (record.result_bytes, record.lhs.bytes, record.rhs.bytes)
    return sum(n * size for n, size in zip(copies, sizes, strict=True))


def operations_of(record: Record, copies: tuple[int, int, int]) -> int:
    """Multiplications and additions."""
    return 2 * copies[0] * math.prod(record.shape) * record.length
