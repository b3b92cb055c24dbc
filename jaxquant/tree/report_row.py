"""One row of a report. A separate module, because tables and plots need only this."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ReportRow:
    """One leaf of a tree in a `Report`.

    Attributes:
        path: its path, such as "layers/0/kernel".
        shape: its shape.
        scheme: how it is quantized, such as "int4 g128, int8 inputs"; None if it is not.
        reason: why it is not quantized; None if it is.
        bits_per_weight: bits in memory per element, scales and zero points included.
        bytes_before, bytes_after: bytes in memory.
        sqnr: signal to quantization noise in dB, 10 log10(sum x^2 / sum (x - q)^2); infinite
            without noise, None without a comparison.
        codes: how often codes fall into each of the equal bins over the format's range, of which
            there are 16 or fewer.
        warning: why its scales may be along the wrong axes: they take more than 2 bits per
            weight, a default rule had to guess the contracted axis, or a function contracts other
            axes. None if none of these.

    Example:
        >>> params = {"kernel": jnp.ones((32, 16))}
        >>> (row,) = jq.tree.report(params, jq.tree.quantize(params, jq.W8A8)).rows
        >>> row.path, row.scheme, row.bytes_before, row.bytes_after
        ('kernel', 'int8 per channel, int8 inputs', 2048, 576)
    """

    path: str
    shape: tuple[int, ...]
    scheme: str | None
    reason: str | None
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    sqnr: float | None
    codes: tuple[int, ...] = ()
    warning: str | None = None
