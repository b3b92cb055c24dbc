"""Compares quantized Keras models on a real task: our layers and stock Keras.

    python -m benchmarks.keras_digits

A convolutional and an attention model are trained on scikit-learn's digits with three seeds in
stock Keras. Their weights are copied into models of our layers and of stock layers, which
`model.quantize` then quantizes. Accuracy is measured on the held-out half of the digits; bytes
include all variables; the time to quantize is that of a second, equal model, after compilation; the
time per batch of 256 is the ratio to float32 in alternating calls of a jit-compiled
`stateless_call`. "unchanged" counts the layers with weights that stock Keras leaves in float. The
last line is the time to quantize a model of many small layers, including compilation. Needs the
extra `bench`.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import itertools
import statistics
import time
import warnings

import jax
import keras
import numpy as np
import rich.console
import rich.progress
import rich.table
from sklearn.datasets import load_digits

import jaxquant.keras as jk

from .timing import by_turns, ratio

SEEDS = (0, 1, 2)
LIBRARIES = {"ours": jk.layers, "stock": keras.layers}


def conv_model(layers):
    """Three convolutions, one of them separable, and two dense layers."""
    return keras.Sequential(
        [
            keras.Input((8, 8)),
            keras.layers.Reshape((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Conv2D(64, 3, strides=2, padding="same", activation="relu"),
            layers.SeparableConv2D(64, 3, padding="same", activation="relu"),
            keras.layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


def attention_model(layers):
    """One block of a transformer over the eight rows of pixels."""
    start = keras.Input((8, 8))
    x = layers.Dense(64, use_bias=False)(start)
    place = layers.EinsumDense("btd,de->bte", (8, 64), bias_axes="te")(x)
    x = keras.layers.add([x, place])
    x = keras.layers.LayerNormalization()(
        keras.layers.add([x, layers.MultiHeadAttention(4, 16)(x, x)])
    )
    hidden = layers.Dense(64)(layers.Dense(128, activation="relu")(x))
    x = keras.layers.LayerNormalization()(keras.layers.add([x, hidden]))
    return keras.Model(start, layers.Dense(10)(keras.layers.Flatten()(x)))


MODELS = {"convolutional": conv_model, "attention": attention_model}


def _stock_int4():
    return keras.quantizers.Int4QuantizationConfig(block_size=32)


MODES = {
    "int8": {"ours": lambda: "int8", "stock": lambda: "int8"},
    "int4 block 32": {
        "ours": lambda: jk.Int4QuantizationConfig(block_size=32),
        "stock": _stock_int4,
    },
    "float8": {"ours": lambda: "float8", "stock": lambda: "float8"},
}


def digits():
    """(training set, test set), each (images, labels) with half of the digits."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    order = np.random.default_rng(0).permutation(len(images))
    return [(images[half], labels[half]) for half in np.array_split(order, 2)]


def train(build, data, seed):
    """A trained model of stock layers."""
    keras.utils.set_random_seed(seed)
    model = build(keras.layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(2e-3), loss=loss)
    model.fit(*data, epochs=40, batch_size=64, verbose=0)
    return model


def quantized(build, trained, library, mode):
    """The trained model in a library's layers, quantized, and the seconds to quantize it."""
    model = build(LIBRARIES[library])
    model.set_weights(trained.get_weights())
    config = MODES[mode][library]()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.quantize(config) if isinstance(config, str) else model.quantize(config=config)
    jax.block_until_ready([v.value for v in model.variables])
    return model, time.perf_counter() - start


def accuracy(model, data):
    """Percentage of digits classified correctly."""
    images, labels = data
    return 100 * float(np.mean(np.argmax(model.predict(images, verbose=0), -1) == labels))


def caller(model, batch):
    """A call of the compiled model, its weights passed as arguments."""
    trainable, others = (
        [v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables)
    )
    run = jax.jit(lambda t, n, x: model.stateless_call(t, n, x)[0])
    return lambda: run(trainable, others, batch)


def row(name, build, trained, data, library, mode):
    """The cells of one combination, the means over the seeds."""
    results = []
    for model in trained:
        found, _ = quantized(build, model, library, mode)
        results.append(accuracy(found, data) - accuracy(model, data))
    # A second one, because the first compiles.
    found, seconds = quantized(build, trained[-1], library, mode)
    batch = data[0][:256]
    layers = [x for x in found._flatten_layers() if x.weights and not x._layers]
    unchanged = sum(x.quantization_mode is None and "norm" not in x.name for x in layers)
    size = sum(v.value.nbytes for v in found.variables)
    calls = {"found": caller(found, batch), "float32": caller(trained[-1], batch)}
    relative = ratio(by_turns(calls), "found", "float32")
    return [
        name,
        mode,
        library,
        f"{statistics.mean(results):+.2f}",
        f"{min(results):+.2f}",
        f"{size / 1000:.1f}",
        str(unchanged),
        f"{1000 * seconds:.0f}",
        f"{relative:.2f}",
    ]


def many_layers(library, count=200):
    """Seconds to quantize a model of many small dense layers."""
    layers = [LIBRARIES[library].Dense(16) for _ in range(count)]
    model = keras.Sequential([keras.Input((16,)), *layers])
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.quantize("int8")
    return time.perf_counter() - start


COLUMNS = (
    "model",
    "mode",
    "layers",
    "accuracy, points",
    "worst seed",
    "kB",
    "unchanged",
    "ms to quantize",
    "time per batch, float32 = 1",
)


def main():
    """Trains, quantizes, prints."""
    table = rich.table.Table(title="Digits, quantized")
    for column in COLUMNS:
        table.add_column(column)
    known, unseen = digits()
    work = list(itertools.product(MODELS, MODES, LIBRARIES))
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as bar:
        task = bar.add_task("Training", total=len(MODELS) * len(SEEDS) + len(work))
        trained = {}
        for name, build in MODELS.items():
            trained[name] = []
            for seed in SEEDS:
                trained[name].append(train(build, known, seed))
                bar.advance(task)
            scores = [accuracy(model, unseen) for model in trained[name]]
            size = sum(v.value.nbytes for v in trained[name][0].trainable_variables)
            cells = [f"{statistics.mean(scores):.2f} %", "", f"{size / 1000:.1f}", "", "", "1"]
            table.add_row(name, "float32", "", *cells)
        for name, mode, library in work:
            bar.update(task, description=f"{name}, {mode}, {library}")
            table.add_row(*row(name, MODELS[name], trained[name], unseen, library, mode))
            bar.advance(task)
    rich.console.Console(width=130).print(table)
    ours, stock = many_layers("ours"), many_layers("stock")
    print(f"200 dense layers of 16 units to int8: ours {ours:.1f} s, stock {stock:.1f} s.")


if __name__ == "__main__":
    main()
