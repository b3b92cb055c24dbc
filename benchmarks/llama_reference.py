"""Compares the logits of the demo's language model with those of llama.cpp.

    python -m benchmarks.llama_reference [--library PATH] [--tokens 1024]

llama.cpp is called in the shared library of the package xllamacpp (`pip install --no-deps
xllamacpp`), of which PATH is the file if it is installed elsewhere. It runs the model twice: as
stored, and dequantized to a float32 file. With quantized weights, llama.cpp rounds activations to
8 bits for each product, and jaxquant does not: the float32 file shows the error of the model alone.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import demo

from . import llama_cpp

WINDOW = 256


@jax.jit
def logits(params, config, window):
    """Logits (T, V) of the demo's model."""
    cache = demo.init_cache(params, config, 1, window.shape[0], jnp.float32)
    x, _ = demo.forward(params, config, window[None], cache)
    return demo.logits(params, x)[0]


def compare(name: str, ours: list[np.ndarray], others) -> dict[str, float]:
    """Prints and returns the relative error, and how often the most probable token is the same."""
    errors, sizes, same = [], [], []
    for found, wanted in zip(ours, others, strict=True):
        # Without the mean of a row, which does not change probabilities.
        a, b = (x - x.mean(1, keepdims=True) for x in (found, wanted))
        errors.append(np.sum(np.square(a - b, dtype=np.float64)))
        sizes.append(np.sum(np.square(b, dtype=np.float64)))
        same.append(np.mean(a.argmax(1) == b.argmax(1)))
    error, agreement = float(np.sqrt(sum(errors) / sum(sizes))), float(np.mean(same))
    count = sum(map(len, ours))
    print(f"{name}: {count} tokens, relative error {error:.1e}, top-1 agreement {agreement:.4f}")
    return {"error": error, "agreement": agreement}


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description="Compares logits.")
    parser.add_argument("--library", type=Path, metavar="PATH")
    parser.add_argument("--tokens", type=int, default=4 * WINDOW)
    options = parser.parse_args()
    path, lib = demo.packaged_llama(), llama_cpp.library(options.library)
    model = demo.load_llama(path)
    vocabulary = demo.read_vocabulary(model.checkpoint)
    ids = vocabulary.encode(demo.held_out_text())
    windows = demo.windows(ids, options.tokens // WINDOW, WINDOW)
    ours = [np.asarray(logits(model.params, model.config, jnp.asarray(w))) for w in windows]
    compare("as stored", ours, llama_cpp.logits(lib, path, windows))
    with tempfile.TemporaryDirectory() as folder:
        floats = Path(folder) / "float32.gguf"
        llama_cpp.write(floats, path)
        compare("float32", ours, llama_cpp.logits(lib, floats, windows))


if __name__ == "__main__":
    main()
