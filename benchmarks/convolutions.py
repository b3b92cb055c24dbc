"""Compares the implementations of int8 convolution with XLA's float32.

    python -m benchmarks.convolutions

float32 images are quantized dynamically and convolved with int8 kernels with one scale per output
channel. Each number is the speed relative to float32 with a float32 kernel: above 1 is faster. All
calls alternate in one run. Slower ones are red.
"""

import contextlib
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from jaxquant import ArrayConfig, Inputs, conv_general_dilated, quantize

from .timing import by_turns, ratio

IMPLEMENTATIONS: tuple[str, ...] = ("native", "shifted", "images", "integer", "dequantize")
TRANSPOSED = {"lhs_dilation": (2, 2), "padding": ((1, 2), (1, 2))}
# Name: shape of the images, shape of the kernel, axes of both, options.
CASES = {
    "3x3": ((4, 28, 28, 64), (3, 3, 64, 128), "NHWC HWIO", {}),
    "3x3, 512 channels": ((4, 7, 7, 512), (3, 3, 512, 512), "NHWC HWIO", {}),
    "7x7 of pictures": ((1, 112, 112, 3), (7, 7, 3, 64), "NHWC HWIO", {}),
    "1x1": ((4, 28, 28, 64), (1, 1, 64, 128), "NHWC HWIO", {}),
    "1x1, stored as a matrix": ((4, 28, 28, 64), (128, 1, 1, 64), "NHWC OHWI", {}),
    "4 groups": ((4, 28, 28, 64), (3, 3, 16, 128), "NHWC HWIO", {"feature_group_count": 4}),
    "depthwise": ((4, 28, 28, 64), (3, 3, 1, 64), "NHWC HWIO", {"feature_group_count": 64}),
    "transposed": ((4, 14, 14, 64), (3, 3, 64, 128), "NHWC HWIO", TRANSPOSED),
    "channels first": ((4, 64, 28, 28), (3, 3, 64, 128), "NCHW HWIO", {}),
    "of PyTorch": ((4, 64, 28, 28), (128, 64, 3, 3), "NCHW OIHW", {}),
    "one axis": ((4, 200, 128), (3, 128, 128), "NWC WIO", {}),
    "one axis, channels first": ((4, 128, 200), (3, 128, 128), "NCW WIO", {}),
    "three axes": ((2, 12, 16, 16, 32), (3, 3, 3, 32, 64), "NDHWC DHWIO", {}),
}


def call_of(shape, kernel_shape, axes, options):
    """The convolution of a case, its images, and its kernel in float32 and in int8."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, kernel_shape))
    images, kernels = axes.split()
    options = {"padding": "SAME", "dimension_numbers": (images, kernels, images), **options}
    run = partial(conv_general_dilated, window_strides=(1,) * (x.ndim - 2), **options)
    q = quantize(kernel, ArrayConfig(), axis=tuple(a for a in range(x.ndim) if kernels[a] != "O"))
    return run, x, kernel, dataclasses.replace(q, inputs=Inputs(ArrayConfig()))


def speeds(case):
    """Speed of each implementation relative to float32."""
    run, x, kernel, q = call_of(*case)
    calls = {"float32": partial(jax.jit(run), x, kernel)}
    for name in IMPLEMENTATIONS:
        call = partial(jax.jit(partial(run, implementation=name)), x, q)
        with contextlib.suppress(ValueError):  # It does not convolve these operands.
            jax.eval_shape(call)
            calls[name] = call
    times = by_turns(calls)
    return [
        1 / ratio(times, name, "float32") if name in calls else None for name in IMPLEMENTATIONS
    ]


def main():
    """Runs every case."""
    title = f"int8 convolutions on {jax.default_backend()}, speed of float32 = 1"
    table = rich.table.Table("convolution", *IMPLEMENTATIONS, title=title)
    for name, case in CASES.items():
        found = speeds(case)
        table.add_row(name, *map(_cell, found))
    rich.console.Console().print(table)


def _cell(speed):
    if speed is None:
        return "-"
    return f"{speed:.2f}" if speed >= 1 else f"[red]{speed:.2f}[/red]"


if __name__ == "__main__":
    main()
