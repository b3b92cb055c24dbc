"""The recipes of low-precision training in NumPy, each written from its paper.

All multiply x (M, K) by w (K, N), and get the gradient g (M, N) of the product. They return the
product, the gradient of x, and that of w. Gradients are rounded to nearest.
"""

import ml_dtypes
import numpy as np

from .products import int8, tiles

E4M3, E4M3_LARGEST = ml_dtypes.float8_e4m3fn, 448.0
E5M2, E5M2_LARGEST = ml_dtypes.float8_e5m2, 57344.0
E2M1, E2M1_LARGEST = ml_dtypes.float4_e2m1fn, 6.0


def cast(x, dtype, largest):
    """Rounds to nearest, ties to even, and saturates."""
    clipped = np.clip(np.asarray(x, np.float32), -largest, largest)
    return clipped.astype(dtype).astype(np.float64)


def each_tile(x, rows, columns, quantized):
    """Applies a function to tiles of rows x columns; None is the whole axis."""
    x = np.asarray(x, np.float64)
    lengths = {a: n for a, n in enumerate((rows, columns)) if n is not None}
    out = np.zeros_like(x)
    for tile in tiles(x.shape, lengths):
        out[tile] = quantized(x[tile])
    return out


def largest(x):
    """The largest magnitude; 1 if there is none, so that zeros stay zeros."""
    return float(np.max(np.abs(x), initial=0)) or 1.0


def products(x, w, g, of_out, of_x, of_w):
    """Three products, of quantized operands each."""
    return (
        of_out[0](x) @ of_out[1](w),
        of_x[0](g) @ of_x[1](w).T,
        of_w[0](x).T @ of_w[1](g),
    )


def rows(x):
    """int8 with a scale per row: the columns are contracted."""
    return int8(x, {0: 1})


def columns(x):
    """int8 with a scale per column: the rows are contracted."""
    return int8(x, {1: 1})


def int8_training(x, w, g):
    """StatQuant, arXiv:2010.14298: int8 in all three."""
    return products(x, w, g, (rows, columns), (rows, rows), (columns, columns))


def switchback(x, w, g):
    """SwitchBack, arXiv:2304.13013, algorithm 1: the gradient of weights in float."""
    exact = np.asarray
    return products(x, w, g, (rows, columns), (rows, rows), (exact, exact))


def fp8_training(x, w, g, limits=(None, None, None)):
    """arXiv:2209.05433, section 3: one scale per tensor, of this step or of previous ones."""

    def scaled(x, dtype, top, limit):
        scale = np.float32(limit or largest(x)) / np.float32(top)
        return cast(np.asarray(x, np.float32) / scale, dtype, top) * float(scale)

    x = scaled(x, E4M3, E4M3_LARGEST, limits[0])
    w = scaled(w, E4M3, E4M3_LARGEST, limits[1])
    g = scaled(g, E5M2, E5M2_LARGEST, limits[2])
    return x @ w, g @ w.T, x.T @ g


def fp8_blocks(x, w, g):
    """DeepSeek-V3, arXiv:2412.19437, section 3.3.2: tiles of 1 x 128 and blocks of 128 x 128."""

    def quantized(x):
        scale = np.float32(largest(x)) / np.float32(E4M3_LARGEST)
        return cast(np.asarray(x, np.float32) / scale, E4M3, E4M3_LARGEST) * float(scale)

    def along_columns(x):
        return each_tile(x, 1, 128, quantized)

    def along_rows(x):
        return each_tile(x, 128, 1, quantized)

    def blocks(w):
        return each_tile(w, 128, 128, quantized)

    return products(
        x, w, g, (along_columns, blocks), (along_columns, blocks), (along_rows, along_rows)
    )


def mxfp8_training(x, w, g):
    """OCP MX v1.0 with scales rounded up, arXiv:2506.08027: groups of 32, powers of two."""

    def quantized(x):
        scale = 2.0 ** np.ceil(np.log2(largest(x) / E4M3_LARGEST))
        return cast(x / scale, E4M3, E4M3_LARGEST) * scale

    def along_columns(x):
        return each_tile(x, 1, 32, quantized)

    def along_rows(x):
        return each_tile(x, 32, 1, quantized)

    return products(
        x,
        w,
        g,
        (along_columns, along_rows),
        (along_columns, along_columns),
        (along_rows, along_rows),
    )


def nvfp4(x, height, width):
    """arXiv:2509.25149, appendix B: e2m1 under e4m3 scales under a float32 scale."""
    unit = np.float32(largest(x)) / np.float32(E2M1_LARGEST * E4M3_LARGEST)

    def quantized(x):
        amax = np.float32(np.max(np.abs(x), initial=0))
        scale = cast(amax / np.float32(E2M1_LARGEST) / unit, E4M3, E4M3_LARGEST)
        scale = np.float32(max(scale, 2.0**-9)) * unit
        return cast(np.asarray(x, np.float32) / scale, E2M1, E2M1_LARGEST) * float(scale)

    return each_tile(x, height, width, quantized)


def nvfp4_training(x, w, g, rotation):
    """arXiv:2509.25149, section 4: 16 x 16 blocks of weights, rotated tokens for their gradient.

    `rotation` is diag(signs) H / 4 for a Hadamard matrix H of order 16.
    """

    def rotated(x):
        count = -(-len(x) // 16)
        padded = np.pad(np.asarray(x, np.float64), [(0, 16 * count - len(x)), (0, 0)])
        return np.einsum("btk,ts->bsk", padded.reshape(count, 16, -1), rotation).reshape(
            16 * count, -1
        )

    def along_columns(x):
        return nvfp4(x, 1, 16)

    def blocks(w):
        return nvfp4(w, 16, 16)

    def along_tokens(x):
        return nvfp4(rotated(x), 16, 1)

    return products(
        x, w, g, (along_columns, blocks), (along_columns, blocks), (along_tokens, along_tokens)
    )
