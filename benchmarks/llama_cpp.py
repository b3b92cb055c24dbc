"""llama.cpp, called in the shared library of the package `xllamacpp`."""

import ctypes
import importlib.util
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import jaxquant as jq
from jaxquant import checkpoints

# What llama.cpp calls for each line of its log.
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *line: None)


class _Parameters(ctypes.Structure):
    """A structure that is passed as it came, except for its first fields."""

    _fields_ = (("first", ctypes.c_uint32 * 4), ("rest", ctypes.c_uint8 * 1008))


class _Batch(ctypes.Structure):
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


def packaged_library() -> Path:
    """The shared library of the installed package.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "llama.cpp is not installed: pip install --no-deps xllamacpp", name="xllamacpp"
        )
    return next(Path(spec.origin).parent.glob("xllamacpp*.so"))


def library(path: Path | None = None) -> ctypes.CDLL:
    """llama.cpp, ready to be called, from a file or the installed package.

    Raises:
        ModuleNotFoundError: as for `packaged_library`.
    """
    lib = ctypes.CDLL(str(path or packaged_library()))
    lib.llama_log_set(_LOG, None)
    pointer, numbers = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_model_default_params", _Parameters, ()),
        ("llama_context_default_params", _Parameters, ()),
        ("llama_model_load_from_file", pointer, (ctypes.c_char_p, _Parameters)),
        ("llama_model_get_vocab", pointer, (pointer,)),
        ("llama_vocab_n_tokens", numbers, (pointer,)),
        ("llama_init_from_model", pointer, (pointer, _Parameters)),
        ("llama_set_n_threads", None, (pointer, numbers, numbers)),
        ("llama_get_memory", pointer, (pointer,)),
        ("llama_memory_seq_rm", ctypes.c_bool, (pointer, numbers, numbers, numbers)),
        ("llama_batch_init", _Batch, (numbers, numbers, numbers)),
        ("llama_batch_free", None, (_Batch,)),
        ("llama_decode", numbers, (pointer, _Batch)),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), (pointer,)),
        ("llama_free", None, (pointer,)),
        ("llama_model_free", None, (pointer,)),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_backend_init()
    return lib


def write(path: Path, template: Path, config: jq.ArrayConfig | None = None) -> None:
    """Writes the model of a file with its matrices in float32, or quantized again.

    Args:
        path: of the new file.
        template: the file.
        config: of weights, one that `checkpoints.write_gguf` writes exactly; None for float32.
    """
    found = checkpoints.open_gguf(template)
    arrays = {}
    for name in found:
        value = found.load([name])[name]
        if isinstance(value, jq.QTensor):
            floats = value.dequantize()
            value = floats if config is None else jq.quantize(floats, config, axis=-1)
        arrays[name] = value if isinstance(value, jq.QTensor) else np.asarray(value)
    checkpoints.write_gguf(path, template, arrays)


class Model:
    """A model of a file."""

    def __init__(self, lib: ctypes.CDLL, path: Path):
        self.lib, self.path = lib, path
        options = lib.llama_model_default_params()
        self.pointer = lib.llama_model_load_from_file(str(path).encode(), options)
        if not self.pointer:
            raise SystemExit(f"llama.cpp cannot read {path}.")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.pointer))
        weakref.finalize(self, lib.llama_model_free, self.pointer)


class Context:
    """Sequences of tokens, and the keys and values of those that ran.

    Args:
        model: what runs them.
        length: capacity of each sequence.
        sequences: their number.
        at_once: tokens that run at once; `length`, but at most 512, by default.
        threads: of the processor; 0 leaves them as llama.cpp has them.
    """

    def __init__(
        self, model: Model, length: int, sequences: int = 1, at_once: int = 0, threads: int = 0
    ):
        self.model, self.lib = model, model.lib
        options = self.lib.llama_context_default_params()
        at_once = at_once or min(512, length)
        capacity = length * sequences
        # n_ctx, n_batch, n_ubatch and n_seq_max.
        options.first[:] = capacity, capacity, max(at_once, sequences), sequences
        self.sequences = sequences
        self.pointer = self.lib.llama_init_from_model(model.pointer, options)
        weakref.finalize(self, self.lib.llama_free, self.pointer)
        if threads:
            self.lib.llama_set_n_threads(self.pointer, threads, threads)

    def run(self, tokens: np.ndarray, start: int, every: bool = False) -> np.ndarray:
        """Runs further tokens of each sequence.

        Args:
            tokens: ids (B, T), of all sequences.
            start: position of the first of each.
            every: whether to return logits of all tokens.

        Returns:
            Logits after the last token of each sequence, (B, V), or of all, (B * T, V).
        """
        count, length = tokens.shape
        batch = self.lib.llama_batch_init(tokens.size, 0, 1)
        batch.n_tokens = tokens.size
        for i, token in enumerate(tokens.reshape(-1).tolist()):
            sequence, position = divmod(i, length)
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, every or position == length - 1
        failed = self.lib.llama_decode(self.pointer, batch)
        self.lib.llama_batch_free(batch)
        if failed:
            raise SystemExit(f"llama.cpp cannot run {tokens.size} tokens of {self.model.path}.")
        shape = (tokens.size if every else count, self.model.vocabulary)
        return np.ctypeslib.as_array(self.lib.llama_get_logits(self.pointer), shape)

    def forget(self, start: int) -> None:
        """Removes the tokens of all sequences from a position on."""
        memory = self.lib.llama_get_memory(self.pointer)
        for sequence in range(self.sequences):
            self.lib.llama_memory_seq_rm(memory, sequence, start, -1)


def logits(lib: ctypes.CDLL, path: Path, windows: Iterable[np.ndarray]) -> Any:
    """Yields the logits (T, V) that llama.cpp computes for each window of tokens (T,)."""
    model = Model(lib, path)
    for window in windows:
        context = Context(model, len(window), at_once=len(window))
        yield context.run(window[None], 0, every=True).copy()
