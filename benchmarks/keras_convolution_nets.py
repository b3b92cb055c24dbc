"""Quantizes convolution nets of `keras.applications`, with random weights.

    python -m benchmarks.keras_convolution_nets [--models MobileNetV2 ...] [--modes int8 int4 ...]

For each net and mode: the seconds of CPU time that `jk.quantize` takes, compilation included, in a
process that has built the net; MB of variables; the norm of the error of the features before the
classifier, relative to that of float; the speed of a jit-compiled call on one image, relative to
float; and the seconds to save and to load a `.keras` file. Red are calls slower than float and nets
that do not compute the same bit for bit after they were loaded.
"""

import argparse
import functools
import os
import tempfile
import time
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
import numpy as np
import rich.console
import rich.progress
import rich.table

import jaxquant.keras as jk

from .timing import by_turns, ratio

MODELS = ("MobileNetV2", "ResNet50", "EfficientNetB0", "ConvNeXtTiny")
MODES = ("int8", "int4")
COLUMNS = ("net", "mode", "s to quantize", "MB", "error", "speed", "s to save", "s to load")
SIZE = 96


def net(name: str) -> Any:
    """A net with random weights, batch statistics and biases included, without its classifier."""
    keras.utils.set_random_seed(0)
    made = getattr(keras.applications, name)(
        weights=None, include_top=False, pooling="avg", input_shape=(SIZE, SIZE, 3)
    )
    rng = np.random.default_rng(0)
    for variable in made.variables:
        if len(variable.shape) == 1:
            noise = 0.1 * rng.normal(size=variable.shape)
            variable.assign(np.asarray(variable) + noise.astype("float32"))
    for layer in made.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            variance: Any = layer.moving_variance
            variance.assign(np.abs(np.asarray(variance)))
    return made


def seconds(function: Any) -> tuple[float, Any]:
    """CPU time of a call, and its result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def size(model):
    """Bytes of all variables."""
    return sum(v.value.nbytes for v in model.variables)


def compiled(model):
    """A jitted call of the model."""
    apply, params = jk.functional(model)
    call = jax.jit(apply)
    return lambda x: call(params, x)


def rows(name, modes, advance):
    """Rows of the table for one net, float first."""
    model = net(name)
    x = np.random.default_rng(1).uniform(0, 255, (1, SIZE, SIZE, 3)).astype("float32")
    exact = np.asarray(model(x))
    calls = {"float": compiled(model)}
    found, made = {}, {}
    for mode in modes:
        took, (quantized, _) = seconds(functools.partial(jk.quantize, model, mode))
        outputs = np.asarray(quantized(x))
        calls[mode] = compiled(quantized)
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/net.keras"
            saving, _ = seconds(functools.partial(quantized.save, path))
            loading, loaded = seconds(functools.partial(keras.saving.load_model, path))
        is_same = np.array_equal(np.asarray(loaded(x)), outputs)
        error = np.linalg.norm(outputs - exact) / np.linalg.norm(exact)
        loads = f"{loading:.1f}" if is_same else f"[red]{loading:.1f}[/red]"
        found[mode] = (f"{took:.1f}", f"{size(quantized) / 1e6:.1f}", f"{error:.3f}")
        made[mode] = (f"{saving:.1f}", loads)
        advance()
    times = by_turns({key: functools.partial(call, x) for key, call in calls.items()})
    yield (name, "float", "", f"{size(model) / 1e6:.1f}", "", "1", "", "")
    for mode in modes:
        speed = 1 / ratio(times, mode, "float")
        shown = f"{speed:.2f}" if speed >= 1 else f"[red]{speed:.2f}[/red]"
        yield (name, mode, *found[mode], shown, *made[mode])


def main(arguments=None):
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--modes", nargs="+", default=MODES)
    options = parser.parse_args(arguments)
    title = f"Convolution nets on {jax.default_backend()}, images of {SIZE}x{SIZE}, keras "
    table = rich.table.Table(*COLUMNS, title=title + keras.__version__)
    console = rich.console.Console(width=110)
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as progress:
        task = progress.add_task("nets", total=len(options.models) * len(options.modes))
        for name in options.models:
            for row in rows(name, options.modes, lambda: progress.advance(task)):
                table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
