"""Compares the logits of the demo's language model with those of llama.cpp.

    python -m benchmarks.llama_reference [--library PATH] [--tokens 1024]

llama.cpp is called in the shared library of the package xllamacpp (`pip install --no-deps
xllamacpp`), of which PATH is the file if it is installed elsewhere. It runs the model twice: as
stored, and dequantized to a float32 file. With quantized weights, llama.cpp rounds activations to
8 bits for each product, and jaxquant does not: the float32 file shows the error of the model alone.
"""

import argparse
import ctypes
import importlib.util
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import QTensor, checkpoints, demo

WINDOW = 256


# What llama.cpp calls for each line of its log.
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *line: None)


class Parameters(ctypes.Structure):
    """A structure that is passed as it came, except for its first fields."""

    _fields_ = (("first", ctypes.c_uint32 * 4), ("rest", ctypes.c_uint8 * 1008))


class Batch(ctypes.Structure):
    """llama_batch of llama.h."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def library(path: Path | None) -> ctypes.CDLL:
    """llama.cpp, with the signatures of what is called below."""
    spec = None if path else importlib.util.find_spec("xllamacpp")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "xllamacpp.abi3.so"
    if path is None:
        raise SystemExit("llama.cpp is not installed: pip install --no-deps xllamacpp")
    lib = ctypes.CDLL(str(path))
    lib.llama_log_set(LOG, None)
    lib.llama_model_default_params.restype = Parameters
    lib.llama_context_default_params.restype = Parameters
    lib.llama_model_load_from_file.restype = ctypes.c_void_p
    lib.llama_model_load_from_file.argtypes = (ctypes.c_char_p, Parameters)
    lib.llama_init_from_model.restype = ctypes.c_void_p
    lib.llama_init_from_model.argtypes = (ctypes.c_void_p, Parameters)
    lib.llama_batch_init.restype = Batch
    lib.llama_decode.argtypes = (ctypes.c_void_p, Batch)
    lib.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    lib.llama_get_logits.argtypes = (ctypes.c_void_p,)
    lib.llama_batch_free.argtypes = (Batch,)
    lib.llama_free.argtypes = lib.llama_model_free.argtypes = (ctypes.c_void_p,)
    return lib


def reference_logits(lib: ctypes.CDLL, path: Path, windows: np.ndarray, vocabulary: int):
    """Yields the logits (T, V) that llama.cpp computes for each window."""
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot read {path}.")
    for window in windows:
        options = lib.llama_context_default_params()
        # n_ctx, n_batch and n_ubatch.
        options.first[0] = options.first[1] = options.first[2] = len(window)
        context = lib.llama_init_from_model(model, options)
        batch = lib.llama_batch_init(len(window), 0, 1)
        batch.n_tokens = len(window)
        for i, token in enumerate(window.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        if lib.llama_decode(context, batch):
            raise SystemExit(f"llama.cpp cannot decode {len(window)} tokens of {path}.")
        found = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(window), vocabulary))
        yield found.copy()
        lib.llama_batch_free(batch)
        lib.llama_free(context)
    lib.llama_model_free(model)


@jax.jit
def logits(params, config, window):
    """Logits (T, V) of the demo's model."""
    cache = demo.init_cache(params, config, 1, window.shape[0], jnp.float32)
    x, _ = demo.forward(params, config, window[None], cache)
    return demo.logits(params, x)[0]


def write_floats(path: Path, template: Path) -> None:
    """The model of a file, dequantized to float32."""
    found = checkpoints.open_gguf(template)
    floats = {}
    for name in found:
        value = found.load([name])[name]
        floats[name] = np.asarray(value.dequantize() if isinstance(value, QTensor) else value)
    checkpoints.write_gguf(path, template, floats)


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
    path, lib = demo.packaged_llama(), library(options.library)
    model = demo.load_llama(path)
    vocabulary = demo.read_vocabulary(model.checkpoint)
    ids = vocabulary.encode(demo.held_out_text())
    windows = demo.windows(ids, options.tokens // WINDOW, WINDOW)
    size = model.params["embedding"].shape[0]
    lib.llama_backend_init()
    ours = [np.asarray(logits(model.params, model.config, jnp.asarray(w))) for w in windows]
    compare("as stored", ours, reference_logits(lib, path, windows, size))
    with tempfile.TemporaryDirectory() as folder:
        floats = Path(folder) / "float32.gguf"
        write_floats(floats, path)
        compare("float32", ours, reference_logits(lib, floats, windows, size))


if __name__ == "__main__":
    main()
