"""Trees in files: safetensors, with the structure and every static field in its header.

The header's metadata has two entries: MANIFEST, JSON with the version, the user's metadata,
and, compressed because names repeat, the structure, the number formats and a checksum for each
tensor; and CHECKSUM, that of MANIFEST. Codes of less than a byte are packed; dtypes that
safetensors cannot give to NumPy are stored as their bytes. Nothing is pickled, and nothing but
this module is needed to read.
"""

import base64
import json
import os
import secrets
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from .manifest import Decoder, Encoder
from .paths import is_quantized, leaves_with_paths

VERSION = 1
_MANIFEST, _CHECKSUM = "jaxquant", "jaxquant.crc32"
# Bytes of a header that safetensors reads.
_LONGEST_HEADER = 100_000_000


def save(path: str | os.PathLike, tree: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a tree of arrays and QTensors to a safetensors file, bit for bit.

    The file appears whole or not at all: it is written under a temporary name beside its
    place, flushed to disk, and renamed.

    Args:
        path: file to write, or to replace.
        tree: nested dicts (keys str or int), lists, tuples and None, with arrays, QTensors,
            numbers and strings at the leaves. Other containers (named tuples, dataclasses,
            Flax and Equinox nodes) are written as dicts of their children; `load` puts them
            back with `like=`.
        metadata: strings of your own, for `read_metadata`.

    Raises:
        FileNotFoundError, IsADirectoryError: as for `check_target`.
        ValueError: a leaf is none of these, by path; or metadata is not of strings.
    """
    check_target(path)
    metadata = dict(metadata or {})
    if not all(isinstance(s, str) for item in metadata.items() for s in item):
        raise ValueError(f"metadata must map str to str; got {metadata!r}. Use json.dumps.")
    encoder = Encoder()
    contents = {
        "structure": encoder.encode(tree),
        "statics": encoder.statics,
        "tensors": {name: _checksum(array) for name, array in encoder.arrays.items()},
    }
    manifest = {"version": VERSION, "metadata": metadata, "tree": _compress(contents)}
    text = json.dumps(manifest)
    header = {_MANIFEST: text, _CHECKSUM: str(zlib.crc32(text.encode()))}
    _write_atomically(
        Path(path), lambda name: safetensors.numpy.save_file(encoder.arrays, name, metadata=header)
    )


def check_target(path: str | os.PathLike) -> None:
    """Raises if `save` cannot write to `path`: for use before the work that ends in a file.

    Args:
        path: file to write, or to replace.

    Raises:
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: it is a folder.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; create it first.")
    if Path(path).is_dir():
        example = Path(path) / "model.safetensors"
        raise IsADirectoryError(f"{path} is a folder; name a file, such as {example}.")


def load(path: str | os.PathLike, *, like: Any = None) -> Any:
    """Reads a tree that `save` wrote, tensor by tensor from a memory map.

    Args:
        path: file to read.
        like: tree with the structure that is wanted, such as an abstract one from
            `jax.eval_shape`; None for dicts, lists and tuples as they were saved.

    Returns:
        The tree, its arrays on the default device. 64-bit arrays stay NumPy arrays unless
        64-bit types are enabled in JAX, which would cut them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, altered, not safetensors, not from `save`, or of a
            newer version, or does not have the structure of `like`; the text says which.
    """
    contents = _decompress(_read_manifest(path)["tree"])
    checksums = contents["tensors"]
    with _open(path) as file:
        missing = sorted(set(checksums) - set(file.keys()))
        if missing:
            raise ValueError(
                f"{path} has lost {len(missing)} tensors, such as {missing[0]!r}. Save it anew."
            )

        def read(name):
            array = file.get_tensor(name)
            if _checksum(array) != checksums[name]:
                raise ValueError(
                    f"{path} was altered: tensor {name!r} does not have its checksum "
                    f"{checksums[name]}. Save it anew."
                )
            return array

        tree = Decoder(contents["statics"], read).decode(contents["structure"])
    return tree if like is None else _restructure(tree, like, path)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The strings that `save` was given, without reading any tensor.

    Raises:
        FileNotFoundError, ValueError: as for `load`.
    """
    return _read_manifest(path)["metadata"]


def is_saved_tree(path: str | os.PathLike) -> bool:
    """Whether `save` wrote the file, rather than another writer of safetensors.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is not safetensors.
    """
    return _MANIFEST in _read_header(path)


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of any safetensors file, by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or not safetensors, or has a dtype that safetensors
            cannot give to NumPy.
    """
    with _open(path) as file:
        return {name: _read_array(file, name, path) for name in file.keys()}  # noqa: SIM118


def _read_array(file, name, path):
    try:
        return file.get_tensor(name)
    except AttributeError as error:
        raise ValueError(
            f"{path}: {name!r} has dtype {file.get_slice(name).get_dtype()}, which safetensors "
            "cannot give to NumPy. Store it as bfloat16 or float32."
        ) from error


def _restructure(tree, like, path):
    # A file has no Deferred, but the arrays in it.
    paths, leaves, _ = leaves_with_paths(tree, is_quantized)
    wanted, leaves_like, treedef = leaves_with_paths(like, is_quantized)
    found = dict(zip(paths, leaves, strict=True))
    if len(found) < len(paths):
        twice = next(p for p in paths if paths.count(p) > 1)
        raise ValueError(
            f"{path} has several leaves at {twice!r}, which `like` cannot tell apart. Load it "
            "without `like`."
        )
    if set(found) != set(wanted):
        odd = sorted(set(found) ^ set(wanted))
        raise ValueError(
            f"{path} and `like` must have the same leaves; got {len(paths)} and {len(wanted)}, "
            f"which differ at {', '.join(odd[:5])}."
        )
    for place, leaf in zip(wanted, leaves_like, strict=True):
        if np.shape(found[place]) != np.shape(leaf):
            raise ValueError(
                f"{path} and `like` must have the same shapes; got {np.shape(found[place])} and "
                f"{np.shape(leaf)} at {place!r}."
            )
    return jax.tree.unflatten(treedef, [found[p] for p in wanted])


def _checksum(array):
    """CRC-32 of dtype, shape and bytes."""
    start = zlib.crc32(f"{array.dtype.name}{array.shape}".encode())
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, start)


def _write_atomically(path, write):
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.touch()
    mode = (path if path.exists() else temporary).stat().st_mode
    try:
        write(temporary)
        # safetensors makes files that their owner alone may read.
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    # The name, too, must outlive a crash.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_header(path) -> dict[str, str]:
    with _open(path) as file:
        return file.metadata() or {}


def _read_manifest(path) -> dict[str, Any]:
    header = _read_header(path)
    if _MANIFEST not in header:
        raise ValueError(
            f"{path} is a safetensors file, but not one that jaxquant.save wrote: its header has "
            f"no {_MANIFEST!r} entry. Read it with safetensors.numpy.load_file."
        )
    text = header[_MANIFEST]
    if header.get(_CHECKSUM) != str(zlib.crc32(text.encode())):
        raise ValueError(
            f"{path} was altered: its header does not have the checksum "
            f"{header.get(_CHECKSUM)}. Save it anew."
        )
    manifest = json.loads(text)
    if manifest["version"] > VERSION:
        raise ValueError(
            f"{path} has version {manifest['version']}; this jaxquant reads up to {VERSION}. "
            "Update jaxquant."
        )
    return manifest


def _compress(value):
    return base64.b64encode(zlib.compress(json.dumps(value).encode(), 9)).decode()


def _decompress(text):
    return json.loads(zlib.decompress(base64.b64decode(text)))


def _open(path):
    _check_whole(path)
    try:
        return safetensors.safe_open(path, "numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} was altered: {error}. Copy it anew.") from error


def _check_whole(path):
    """Raises if the file is not safetensors, or shorter than its header says."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        text = file.read(min(length, size))
    if length > _LONGEST_HEADER or not text.startswith(b"{"):
        raise ValueError(
            f"{path} is not a safetensors file: {size} bytes, without its header. Choose another."
        )
    expected = 8 + length + (0 if length + 8 > size else _data_bytes(text, path))
    if size != expected:
        state = "truncated" if size < expected else "altered"
        raise ValueError(
            f"{path} is {state}: {size} bytes, and its header says {expected}. Copy it anew."
        )


def _data_bytes(text, path):
    try:
        entries = [e for k, e in json.loads(text).items() if k != "__metadata__"]
        return max([0, *(e["data_offsets"][1] for e in entries)])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} was altered: its header cannot be read, {error!r}. Copy it anew."
        ) from error
