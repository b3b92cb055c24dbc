"""Recognises the container of a checkpoint and opens it."""

import os
from pathlib import Path

from ..tree.internal import check_regular, has_manifest, is_safetensors
from .checkpoint import Checkpoint
from .gguf import open_gguf
from .huggingface import open_folder
from .own import open_own

_ELSEWHERE = {
    ".keras": "open it with keras.models.load_model, after `import jaxquant.keras`, which also "
    "reads models that Keras quantized",
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".npz")


def open(path: str | os.PathLike[str], *, names: str | None = None) -> Checkpoint:
    """Opens a checkpoint. Only headers are read; tensors are read when they are loaded.

    Args:
        path: a GGUF file; a folder of a Hugging Face model, its index file or one of its
            safetensors files; or a file that `jaxquant.save` wrote.
        names: how the tensors of a GGUF file are named, "stored" (the default) or "huggingface"
            (see `checkpoints.open_gguf`). None for other checkpoints.

    Raises:
        OSError: `path` cannot be read.
        ValueError: `names` is given for another kind; or what is at `path` is not a checkpoint, is
            malformed, or is of a kind that is not supported. The error says what to do.

    Example:
        >>> jq.save("model.safetensors", {"w": jnp.ones((4, 2))})
        >>> jq.checkpoints.open("model.safetensors")
        Checkpoint('model.safetensors', jaxquant, tensors=1)
    """
    path = Path(path)
    start = b"" if path.is_dir() else _start_of(path)
    if start[:4] in (b"GGUF", b"FUGG"):
        return open_gguf(path, names or "stored")
    if names is not None:
        raise ValueError(f"names is for GGUF files; got {names!r} for {path}. Leave it None.")
    if path.is_dir():
        return open_folder(path)
    if path.suffix in _ELSEWHERE:
        raise ValueError(f"{path} is not read here: {_ELSEWHERE[path.suffix]}.")
    is_container = is_safetensors(path)
    is_pickle = start[:2] in (b"PK", b"\x80\x02") and not is_container
    if path.suffix in _PICKLES or is_pickle:
        raise ValueError(
            f"{path} is not safetensors or GGUF but may hold pickled objects, which can run code "
            "when they are read. Convert it to safetensors with the library that wrote it."
        )
    if start.lstrip().startswith(b"{") and not is_container:
        return open_folder(path)
    if start[8:] != b"{":
        found = f"it starts with {start!r}" if start else "it is empty"
        raise ValueError(
            f"{path} is not a checkpoint: {found}. Name a safetensors or GGUF file, or the folder "
            "or index of a Hugging Face model."
        )
    return open_own(path) if has_manifest(path) else open_folder(path)


def _start_of(path: Path) -> bytes:
    check_regular(path)
    with path.open("rb") as file:
        return file.read(9)
