"""Trees in files: safetensors, with the structure and every static field in its header.

The header's metadata has two entries: MANIFEST, JSON with the version, the user's metadata,
and, compressed because names repeat, the structure, the number formats and a checksum for each
tensor; and CHECKSUM, that of MANIFEST. Codes of less than a byte are packed; dtypes that
safetensors does not have are stored as their bytes. Nothing is pickled.
"""

import base64
import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..core import QTensor
from .atomic import replacing
from .manifest import Decoder, Encoder
from .paths import check_sortable, is_quantized, leaves_with_paths
from .tensor_file import (
    MALFORMED,
    MAX_HEADER_BYTES,
    TensorFile,
    bytes_of_array,
    check_regular,
    check_strings,
    open_tensors,
    summary,
    write_tensors,
)

VERSION = 5
_MANIFEST, _CHECKSUM = "jaxquant", "jaxquant.crc32"
# Limit of a decompressed manifest: a small file could decompress to a thousand times its size.
_MAX_CONTENT_BYTES = MAX_HEADER_BYTES


def save(
    path: str | os.PathLike[str], tree: Any, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a tree of arrays and QTensors to a safetensors file, bit for bit.

    The file appears whole or not at all: it is written under a temporary name in the same folder,
    flushed to disk, and renamed. If `path` is a symbolic link, the file that it leads to is
    replaced. Equal trees give equal bytes, whatever the order of their dicts.

    Args:
        path: file to write, or to replace.
        tree: nested dicts (keys str or int), lists, tuples and None, with arrays, QTensors,
            numbers and strings at the leaves. Other containers (named tuples, dataclasses,
            Flax and Equinox nodes) are written as dicts of their children; `load` restores them
            with `like=`.
        metadata: your own strings, for `read_metadata`.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: as for `check_target`.
        OSError: the file cannot be written, for example because the disk is full.
        ValueError: a leaf is of another type, by path; metadata is not of strings; or `path` is a
            device, FIFO or socket.

    Example:
        >>> params = jq.tree.quantize({"kernel": jnp.ones((128, 8))}, jq.W8A8)
        >>> jq.save("small.safetensors", params, {"note": "first try"})
        >>> jq.load("small.safetensors")["kernel"].shape
        (128, 8)
    """
    check_target(path)
    metadata = dict(metadata or {})
    check_strings(metadata)
    encoder = Encoder()
    try:
        structure = encoder.encode(tree)
    except RecursionError as error:
        raise ValueError(f"The tree is nested too deeply to save as {path}; flatten it.") from error
    checksums = {
        name: checksum(array.dtype, array.shape, bytes_of_array(array))
        for name, array in encoder.arrays.items()
    }
    header = header_of(structure, encoder, checksums, metadata)
    with replacing(path) as file:
        write_tensors(file, encoder.arrays, header)


def header_of(
    structure: Any, encoder: Encoder, checksums: Mapping[str, int], metadata: Mapping[str, str]
) -> dict[str, str]:
    """The strings in the header of a file: all but the tensors."""
    contents = {"structure": structure, "statics": encoder.statics, "tensors": dict(checksums)}
    fields = {"version": encoder.version, "metadata": dict(sorted(metadata.items()))}
    text = json.dumps({**fields, "tree": _compress(contents)})
    return {_MANIFEST: text, _CHECKSUM: str(zlib.crc32(text.encode()))}


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises if `save` cannot write to `path`. Call it before long work whose result is saved.

    Args:
        path: file to write, or to replace.

    Raises:
        FileNotFoundError: its folder does not exist.
        PermissionError: its folder cannot be written to.
        IsADirectoryError: it is a folder.
        ValueError: it is a device, FIFO or socket, or no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(
            f"path must be a str or a path, as in jq.save(path, tree); got {type(path).__name__}."
        )
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; create it first.")
    # A link may be broken.
    if os.path.lexists(path):
        folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} is a link into {folder}, which is not a folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to; choose another folder.")
    with contextlib.suppress(FileNotFoundError):
        check_regular(path)


def load(path: str | os.PathLike[str], *, like: Any = None, verify: bool = True) -> Any:
    """Reads a tree that `save` wrote.

    Args:
        path: file to read.
        like: tree with the wanted structure, such as an abstract one from `jax.eval_shape`;
            None for dicts, lists and tuples as they were saved.
        verify: whether each tensor is compared with its checksum, at about 4 GB per second. The
            header is always compared with its own.

    Returns:
        The tree, its arrays on the default device, its dicts in the order of their keys. 64-bit
        arrays stay NumPy arrays unless 64-bit types are enabled, since JAX would truncate them.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is truncated, altered, not safetensors, not from `save`, or of a
            newer version, or does not have the structure of `like`; the text says which.

    Example:
        >>> jq.save("pair.safetensors", (jnp.arange(3), [jnp.ones(2)]))
        >>> jq.load("pair.safetensors")
        (Array([0, 1, 2], dtype=int32), [Array([1., 1.], dtype=float32)])
    """
    with open_tensors(path) as file:
        read = None if verify else _read_unverified(file)
        tree = _decode(file, _read_manifest(file), read)
    return tree if like is None else _restructure(tree, like, path)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the strings that were passed to `save`, without reading any tensor.

    Raises:
        OSError, ValueError: as for `load`.

    Example:
        >>> jq.save("noted.safetensors", {"bias": jnp.ones(3)}, {"note": "first try"})
        >>> jq.tree.read_metadata("noted.safetensors")
        {'note': 'first try'}
    """
    with open_tensors(path) as file:
        return _read_manifest(file)["metadata"]


def read_tree(path: str | os.PathLike[str]) -> tuple[Any, dict[str, str]]:
    """Returns the tree of any safetensors file, and the metadata that was passed to `save`.

    Returns:
        What `load` and `read_metadata` return, if `save` wrote the file; else its arrays by name,
        and {}.

    Raises:
        OSError, ValueError: as for `load`, NumPy does not have the dtype of a tensor, or JAX cannot
            sort the keys of a dict.
    """
    with open_tensors(path) as file:
        if _MANIFEST in file.metadata:
            manifest = _read_manifest(file)
            tree = _decode(file, manifest)
            check_sortable(path, tree)
            return tree, manifest["metadata"]
        return {name: file.read(name) for name in file.entries}, {}


def map_tree(
    path: str | os.PathLike[str], get: Callable[..., Any], restore: Callable[..., Any]
) -> tuple[Any, dict[str, str]]:
    """The tree and the metadata of a file that `save` wrote, with arrays that are read later.

    Args:
        path: file to read.
        get: (file, name, checksum) -> what stands for the stored array. Called while the file is
            open.
        restore: (that, dtype or None, shape or None) -> what stands for the array in the tree; a
            dtype is given for arrays that are stored as bytes (see `manifest`).

    Raises:
        OSError, ValueError: as for `load`.
    """
    with open_tensors(path) as file:
        manifest = _read_manifest(file)

        def read(name: str, expected: int) -> Any:
            return get(file, name, expected)

        return _decode(file, manifest, read, restore), manifest["metadata"]


def has_manifest(path: str | os.PathLike[str]) -> bool:
    """Whether `save` wrote a safetensors file.

    Raises:
        OSError, ValueError: it cannot be read, or is not safetensors.
    """
    with open_tensors(path) as file:
        return _MANIFEST in file.metadata


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of any safetensors file, by name.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is truncated, altered, or not safetensors, or NumPy does not have the
            dtype of a tensor.
    """
    with open_tensors(path) as file:
        return {name: file.read(name) for name in file.entries}


def _read_manifest(file: TensorFile) -> dict[str, Any]:
    """Reads the manifest and checks its version and the types of its parts."""
    path, header = file.path, file.metadata
    if _MANIFEST not in header:
        raise ValueError(
            f"{path} is a safetensors file, but was not written by jaxquant.save: its header has "
            f"no {_MANIFEST!r} entry. Read it with safetensors.numpy.load_file."
        )
    text = header[_MANIFEST]
    # JSON may hold half a surrogate pair.
    checksum = zlib.crc32(text.encode(errors="surrogatepass"))
    if header.get(_CHECKSUM) != str(checksum):
        raise ValueError(
            f"{path} was altered: its header does not have the checksum "
            f"{header.get(_CHECKSUM)}. Save it again."
        )
    try:
        manifest = dict(json.loads(text))
        version = manifest["version"]
        if type(version) is not int or version < 1:
            raise TypeError(f"version must be a positive int, got {version!r}")
        is_newer = version > VERSION
        if not is_newer and not isinstance(manifest["tree"], str):
            raise TypeError(f"tree must be a str, got {manifest['tree']!r}")
        if not is_newer:
            check_strings(manifest["metadata"])
    except MALFORMED as error:
        raise ValueError(f"{path}: its manifest is malformed, {summary(error)}.") from error
    if is_newer:
        raise ValueError(
            f"{path} has version {version}; this jaxquant reads up to {VERSION}. Update jaxquant."
        )
    return manifest


def _decode(
    file: TensorFile,
    manifest: dict[str, Any],
    read: Callable[[str, int], Any] | None = None,
    restore: Callable[..., Any] | None = None,
) -> Any:
    """The tree of a file; `read` and `restore` as for `map_tree`, None to read it now."""
    try:
        contents = _decompress(manifest["tree"])
        structure, statics, checksums = (contents[k] for k in ("structure", "statics", "tensors"))
        missing = sorted(set(checksums) - set(file.entries))
    except (*MALFORMED, zlib.error) as error:
        raise ValueError(f"{file.path}: its structure is malformed, {summary(error)}.") from error
    if missing:
        raise ValueError(
            f"{file.path} lacks {len(missing)} of its tensors, such as {missing[0]!r}. Save it "
            "again."
        )

    def read_now(name: str, expected: int) -> np.ndarray:
        array = file.read(name)
        check_tensor(file.path, name, array, expected)
        return array

    def read_once(name: str) -> Any:
        # Each tensor may be read once; otherwise a small file could demand any amount of memory.
        return (read or read_now)(name, checksums.pop(name))

    try:
        return Decoder(statics, read_once, restore).decode(structure)
    except _Altered:
        raise
    except MALFORMED as error:
        raise ValueError(f"{file.path}: its structure is malformed, {summary(error)}.") from error


def _read_unverified(file: TensorFile) -> Callable[[str, int], np.ndarray]:
    return lambda name, expected: file.read(name)


class _Altered(ValueError):
    """A tensor does not have its checksum."""


def check_tensor(path: Any, name: str, array: np.ndarray, expected: int) -> None:
    """Raises ValueError if a stored array does not have its checksum."""
    if not has_checksum(array, expected):
        raise _Altered(
            f"{path} was altered: tensor {name!r} does not have its checksum {expected}. Save it "
            "again."
        )


def has_checksum(array: np.ndarray, expected: int) -> bool:
    """Whether a stored array has its checksum."""
    whole = np.ascontiguousarray(array)
    return checksum(array.dtype, array.shape, bytes_of_array(whole)) == expected


def _restructure(tree, like, path):
    # A file holds the arrays of a TrainedArray, not the object itself.
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
    kept = [_boxed_like(leaf, found[p]) for p, leaf in zip(wanted, leaves_like, strict=True)]
    for place, new, leaf in zip(wanted, kept, leaves_like, strict=True):
        # Adapters without their base do not have a shape.
        got, expected = (getattr(x, "shape", ()) for x in (new, leaf))
        if got != expected:
            raise ValueError(
                f"{path} and `like` must have the same shapes; got {got} and {expected} at "
                f"{place!r}."
            )
    return jax.tree.unflatten(treedef, kept)


def _boxed_like(like, leaf):
    """The leaf, its codes in the node of one array, a Flax variable say, that those of like are in.

    In the file, such a node is a dict.
    """
    if not (isinstance(like, QTensor) and isinstance(leaf, QTensor)):
        return leaf
    codes, box = jax.tree.leaves(leaf.codes), jax.tree.structure(like.codes)
    if len(codes) != 1 or box.num_leaves != 1:
        return leaf
    return dataclasses.replace(leaf, codes=jax.tree.unflatten(box, codes))


def checksum(dtype: np.dtype, shape: tuple[int, ...], pieces: Iterable[Any]) -> int:
    """CRC-32 of dtype, shape and bytes."""
    found = zlib.crc32(f"{dtype.name}{tuple(shape)}".encode())
    for piece in pieces:
        found = zlib.crc32(piece, found)
    return found


def _compress(value):
    data = json.dumps(value).encode()
    if len(data) > _MAX_CONTENT_BYTES:
        raise ValueError(
            f"The structure of the tree takes {len(data)} bytes; a file may have "
            f"{_MAX_CONTENT_BYTES}. Stack the layers, or save parts of it."
        )
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _decompress(text):
    decompressor = zlib.decompressobj()
    data = decompressor.decompress(base64.b64decode(text), _MAX_CONTENT_BYTES)
    if not decompressor.eof:
        raise ValueError(f"it is incomplete, or has more than {_MAX_CONTENT_BYTES} bytes")
    return json.loads(data)
