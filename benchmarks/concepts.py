"""Draws the pictures of docs/concepts.md: `python -m benchmarks.concepts docs`.

Which elements share a scale, the codes of each format and the errors are those of the library. The
pictures are as wide as a phone can show with readable text.
"""

import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq

WIDTH = 440
SHAPE = (8, 6)
COLORS = ("#3b6fd4", "#d98c3b", "#3f9d6b", "#b8507f", "#7d63c9", "#8a8f3c", "#4aa5b5", "#c25b4e")
INT4 = jq.ArrayConfig(format=jq.INT4)
# Title, config, axis of a kernel (K, N) that is contracted over K.
GRANULARITIES = (
    ("per tensor", INT4, None),
    ("per channel", INT4, 0),
    ("per group of 4", jq.ArrayConfig(format=jq.INT4, group_size=4), 0),
    ("per block of 2 by 2", jq.ArrayConfig(format=jq.INT4, group_size=2), (0, 1)),
)
# Formats with the same values are one row.
FORMATS = {
    "INT2": jq.INT2,
    "INT4": jq.INT4,
    "NF4": jq.NF4,
    "MXFP4, NVFP4": jq.MXFP4,
    "INT8": jq.INT8,
    "FP8_E4M3, MXFP8": jq.FP8_E4M3,
    "FP8_E5M2": jq.FP8_E5M2,
}
RANGES = (
    ("INT4, AbsMax()", INT4),
    ("INT4, MinMSE()", jq.ArrayConfig(format=jq.INT4, range=jq.MinMSE())),
    ("NF4, AbsMax()", jq.ArrayConfig(format=jq.NF4)),
)


def svg(height: float, parts: Sequence[str]) -> str:
    """A picture with a white ground, so that it can be read on dark pages, too."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" '
        f'viewBox="0 0 {WIDTH} {height:g}" font-family="sans-serif" font-size="15">\n'
        f'<rect width="{WIDTH}" height="{height:g}" fill="#fff"/>\n{body}\n</svg>\n'
    )


def text(x: float, y: float, content: str, extra: str = "") -> str:
    """A text whose first letter stands at (x, y)."""
    return f'<text x="{x:.1f}" y="{y:.1f}"{extra}>{content}</text>'


def line(x: float, top: float, bottom: float, color: str, width: float = 1.5) -> str:
    """A vertical line."""
    return f'<path d="M{x:.2f} {top:.1f}V{bottom:.1f}" stroke="{color}" stroke-width="{width}"/>'


def granularities() -> str:
    """A kernel for each granularity; elements of one color share a scale."""
    parts = []
    for i, (title, config, axis) in enumerate(GRANULARITIES):
        q = jq.quantize(jnp.ones(SHAPE), config, axis=axis)
        left, top = 44 + 220 * (i % 2), 30 + 220 * (i // 2)
        shape = "(" + ", ".join(map(str, q.scale.shape)) + ")"
        parts += [
            text(left, top - 10, title, ' font-weight="bold"'),
            text(left, top + 182, f"scale {shape}"),
            text(left - 16, top + 84, "K"),
            text(left + 118, top + 182, "N"),
            *_cells(left, top, q.scale.shape),
        ]
    return svg(445, parts)


def _cells(left: float, top: float, scales: tuple[int, ...]) -> list[str]:
    sizes = [n // s for n, s in zip(SHAPE, scales, strict=True)]
    cells = []
    for k, n in np.ndindex(*SHAPE):
        # Neighbouring blocks differ: a block's color moves on by three in the next row of blocks.
        color = COLORS[(n // sizes[1] + 3 * (k // sizes[0])) % len(COLORS)]
        place = f'x="{left + 22 * n}" y="{top + 20 * k}"'
        cells.append(f'<rect {place} width="20" height="18" rx="3" fill="{color}"/>')
    return cells


def values_of(format: jq.Format) -> np.ndarray:
    """All finite values of a format's codes, over the largest of them."""
    if format.codebook:
        values = np.array(format.codebook)
    elif format.rounds:
        values = np.arange(format.qmin, format.qmax + 1)
    else:
        bits = jnp.arange(2**format.bits, dtype=f"uint{format.bits}")
        values = np.asarray(jax.lax.bitcast_convert_type(bits, format.dtype), np.float32)
        values = np.unique(values[np.isfinite(values)])
    return values / np.max(np.abs(values))


def codes() -> str:
    """The values of each format on a number line from -1 to 1."""
    parts = []
    for i, (name, format) in enumerate(FORMATS.items()):
        values, top = values_of(format), 26 + 52 * i
        parts.append(text(14, top - 6, name, ' font-weight="bold"'))
        parts.append(text(180, top - 6, f"{format.bits} bits, {len(values)} values"))
        width = 1.5 if len(values) < 20 else 0.6
        parts += [line(WIDTH / 2 + 205 * v, top, top + 22, COLORS[0], width) for v in values]
    top = 26 + 52 * len(FORMATS)
    marks = {15: "-1", WIDTH / 2: "0", WIDTH - 15: "1: largest code"}
    anchors = ("start", "middle", "end")
    for (x, label), anchor in zip(marks.items(), anchors, strict=True):
        parts.append(text(x, top - 4, label, f' text-anchor="{anchor}"'))
    return svg(top + 6, parts)


def weights() -> np.ndarray:
    """A group of 127 normal values and one that is far from them."""
    return np.append(np.random.default_rng(0).normal(size=127), 4.5).astype(np.float32)


def error_of(x: np.ndarray, config: jq.ArrayConfig) -> tuple[np.ndarray, float, float]:
    """Errors of a group, and the shares of rounding and of clipping in their squares."""
    q = jq.quantize(x, config, axis=0)
    error = np.asarray(q.dequantize()) - x
    reach = np.max(np.abs(np.asarray(q.dequantize())))
    is_clipped = np.abs(x) > reach * (1 + 1e-6)
    total = np.sum(error**2)
    clipped = float(np.sum(error[is_clipped] ** 2))
    return error, float(total) - clipped, clipped


def errors() -> str:
    """The error of each value of a group, as a line from 0 up or down, where the value lies."""
    x, parts = weights(), []
    for i, (title, config) in enumerate(RANGES):
        error, rounding, clipping = error_of(x, config)
        top, middle = 26 + 128 * i, 26 + 128 * i + 56
        parts += [
            text(14, top - 8, title, ' font-weight="bold"'),
            text(160, top - 8, f"squared error {rounding + clipping:.2f}: rounding"),
            text(160, top + 8, f"{rounding:.2f}, clipping {clipping:.2f}"),
            f'<path d="M15 {middle}H{WIDTH - 15}" stroke="#999"/>',
        ]
        for value, e in zip(x, error, strict=True):
            color = COLORS[7] if value > 4 else COLORS[0]
            end = middle - float(np.clip(100 * e, -45, 45))
            parts.append(line(_place(value), middle, end, color))
    bottom = 26 + 128 * len(RANGES)
    marks = [text(_place(v), bottom, f"{v}", ' text-anchor="middle"') for v in (-2, 0, 2, 4)]
    return svg(bottom + 8, [*parts, *marks])


def _place(value: float) -> float:
    return 15 + (WIDTH - 30) * (float(value) + 3) / 8


PICTURES = {"granularities": granularities, "codes": codes, "errors": errors}


def main(folder: str) -> None:
    for name, draw in PICTURES.items():
        pathlib.Path(folder, f"concepts-{name}.svg").write_text(draw())


if __name__ == "__main__":
    main(sys.argv[1])
