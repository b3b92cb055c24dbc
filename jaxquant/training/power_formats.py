"""Number formats for optimizer states and gradients, whose elements span orders of magnitude.

The codebooks are squares and fourth powers of equidistant numbers: small elements keep their
relative precision, and encoding is a few square roots. On Gaussian blocks signed squares have the
same error as linear codes, but their steps near zero are a hundred times finer.
"""

from ..core import Format, power_codebook


def _row(name, dtype, power, count, has_negative):
    book = power_codebook(power, count, has_negative)
    return Format(name, dtype, book[0], book[-1], codebook=book, power=power)


# 4 bits are kept in int4, which TensorStore and hence Orbax support, unlike uint4.
# For moving averages of gradients. Optimizers divide by the size of each element, so small elements
# matter as much as large ones.
SIGNED_8 = _row("signed_fourth_powers8", "uint8", 4, 127, True)
SIGNED_4 = _row("signed_squares4", "int4", 2, 7, True)
# For sums of gradients, where large elements matter more.
GRADIENT_8 = _row("signed_squares8", "uint8", 2, 127, True)
POSITIVE_8 = _row("fourth_powers8", "uint8", 4, 255, False)
POSITIVE_4 = _row("squares4", "int4", 2, 15, False)
