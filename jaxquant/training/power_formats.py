"""Number formats for averages over steps, whose elements span many orders of magnitude.

Squares and fourth powers of equidistant numbers: small elements keep their digits, and rounding is
a few square roots. Signed squares have the error of linear codes on Gaussian blocks, and steps at
zero that are hundred times finer.
"""

from ..core import Format, power_codebook


def _row(name, dtype, power, count, has_negative):
    book = power_codebook(power, count, has_negative)
    return Format(name, dtype, book[0], book[-1], codebook=book, power=power)


# For averages of gradients, by whose own size optimizers divide: small elements count as much.
SIGNED_8 = _row("signed_fourth_powers8", "uint8", 4, 127, True)
SIGNED_4 = _row("signed_squares4", "uint4", 2, 7, True)
# For sums of gradients, where large elements count more.
GRADIENT_8 = _row("signed_squares8", "uint8", 2, 127, True)
POSITIVE_8 = _row("fourth_powers8", "uint8", 4, 255, False)
POSITIVE_4 = _row("squares4", "uint4", 2, 15, False)
