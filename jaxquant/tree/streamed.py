"""Writes a tree that does not fit in memory: leaf by leaf, and again from where it stopped.

While it is written, a folder beside the file holds `data`, the bytes of finished leaves, and
`journal`, one JSON line per finished leaf. A process that is killed leaves both, and the next one
with the same task goes on after the last leaf.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .atomic import lock, replacing
from .files import check_strings, check_target, checksum, header_of
from .manifest import Encoder, stored_form, to_stored
from .tensor_file import MALFORMED, bytes_of_array, write_tensors

_CHUNK = 2**24


@dataclasses.dataclass(frozen=True)
class _Stored:
    """An array in the data file: the pieces (offset, bytes) that make it up."""

    dtype: np.dtype
    shape: tuple[int, ...]
    checksum: int
    pieces: list[list[int]]

    @property
    def nbytes(self) -> int:
        return sum(n for _, n in self.pieces)


class TreeWriter:
    """Writes the leaves of a flat dict to a file that `load` reads, one after another.

    Args:
        path: file to write, or to replace. It appears when `finish` is called.
        task: what identifies the work. Finished leaves of another task are thrown away.

    Attributes:
        notes: by the name of each finished leaf, what `add` was given; at first those of the
            process that was stopped.

    Raises:
        OSError, ValueError: as for `check_target`; or another process writes the same file.
    """

    def __init__(self, path: str | os.PathLike[str], task: str) -> None:
        check_target(path)
        self.path: Path = Path(path)
        self.folder: Path = Path(f"{path}.partial")
        self.notes: dict[str, Any] = {}
        self._encoder = Encoder(stored_form)
        self._nodes: dict[str, Any] = {}
        self._arrays: dict[str, _Stored] = {}
        self.folder.mkdir(exist_ok=True)
        self._journal = open(self.folder / "journal", "a+b")  # noqa: SIM115 (closed by `close`)
        self._data = open(self.folder / "data", "a+b")  # noqa: SIM115
        if not lock(self._journal.fileno(), unsupported=True):
            self._journal.close()
            self._data.close()
            raise ValueError(
                f"path must not be written by another process; got {self.path}, which is. Wait, or "
                "name another file."
            )
        with self._naming_the_file():
            self._resume(json.dumps(task))

    def add(self, name: str, leaf: Any, parts: Iterable[Any], note: Any = None) -> None:
        """Writes one leaf. Leaves in the order of their names give the bytes that `save` writes.

        Args:
            name: its key in the dict.
            leaf: the array or QTensor, of arrays or of `jax.ShapeDtypeStruct`.
            parts: its parts along the first axis of each stored array, in order; [leaf] if it is
                whole. Each part of codes of less than a byte must fill whole bytes.
            note: a JSON value, or a function that returns one when the parts are written.
        """
        with self._naming_the_file():
            self._add(name, leaf, parts, note)

    def _add(self, name: str, leaf: Any, parts: Iterable[Any], note: Any) -> None:
        before = set(self._encoder.arrays)
        node = self._encoder.encode(leaf, name)
        names = [n for n in self._encoder.arrays if n not in before]
        forms = [self._encoder.arrays[n] for n in names]
        pieces: list[list[list[int]]] = [[] for _ in names]
        sums = [checksum(np.dtype(f.dtype), f.shape, ()) for f in forms]
        for part in parts:
            for i, (array, bits) in enumerate(_in_order(part)):
                sums[i] = self._write(to_stored(array, bits), pieces[i], sums[i])
        self._data.flush()
        stored = {
            n: _Stored(np.dtype(f.dtype), tuple(f.shape), total, places)
            for n, f, total, places in zip(names, forms, sums, pieces, strict=True)
        }
        line = {
            "name": name,
            "node": node,
            "statics": self._encoder.statics,
            "version": self._encoder.version,
            "arrays": {n: [s.dtype.name, s.shape, s.checksum, s.pieces] for n, s in stored.items()},
            "note": note() if callable(note) else note,
        }
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()
        self._keep(line)

    def finish(self, metadata: Mapping[str, str] | None = None) -> None:
        """Writes the file, and removes the folder."""
        metadata = dict(metadata or {})
        check_strings(metadata)
        structure = ["dict", [[name, self._nodes[name]] for name in sorted(self._nodes)]]
        checksums = {name: stored.checksum for name, stored in self._arrays.items()}
        header = header_of(structure, self._encoder, checksums, metadata)
        with replacing(self.path) as file:
            write_tensors(file, self._arrays, header, self._bytes)
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Closes the files. Finished leaves stay for the next process; else nothing does."""
        for file in (self._data, self._journal):
            # What a full disk does not hold is not written a second time.
            with contextlib.suppress(OSError):
                file.close()
        if not self._nodes:
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Closes everything at an error, which names the file if there was no space for it."""
        try:
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and error.errno and not error.filename:
                raise OSError(
                    error.errno, f"{error.strerror}; could not write", str(self.path)
                ) from error
            raise

    def _write(self, stored: np.ndarray, pieces: list[list[int]], total: int) -> int:
        data = next(bytes_of_array(np.ascontiguousarray(stored)))
        start = self._data.seek(0, os.SEEK_END)
        self._data.write(data)
        if pieces and sum(pieces[-1]) == start:
            pieces[-1][1] += data.nbytes
        else:
            pieces.append([start, data.nbytes])
        return zlib.crc32(data, total)

    def _bytes(self, stored: _Stored) -> Iterator[bytes]:
        for start, count in stored.pieces:
            self._data.seek(start)
            for done in range(0, count, _CHUNK):
                yield self._data.read(min(_CHUNK, count - done))

    def _resume(self, task: str) -> None:
        """Keeps the leaves of a process that was stopped, if it had the same task."""
        self._journal.seek(0)
        first = self._journal.readline()
        end = self._journal.tell()
        if first != task.encode() + b"\n":
            self._journal.truncate(0)
            self._data.truncate(0)
            self._journal.write(task.encode() + b"\n")
            self._journal.flush()
            return
        size, stop = os.fstat(self._data.fileno()).st_size, 0
        for text in self._journal:
            line, used = _finished_leaf(text)
            if line is None or used > size:
                break
            self._keep(line)
            end, stop = end + len(text), max(used, stop)
        # What was cut off is written again.
        self._journal.truncate(end)
        self._data.truncate(stop)

    def _keep(self, line: dict[str, Any]) -> None:
        self.notes[line["name"]] = line["note"]
        self._nodes[line["name"]] = line["node"]
        self._encoder.statics = line["statics"]
        self._encoder.version = line["version"]
        for name, (dtype, shape, total, pieces) in line["arrays"].items():
            self._arrays[name] = _Stored(jax.numpy.dtype(dtype), tuple(shape), total, pieces)
            self._encoder.arrays[name] = None


def _finished_leaf(text: bytes) -> tuple[dict[str, Any] | None, int]:
    """A line of the journal and where its data ends; None if the line was cut off."""
    if not text.endswith(b"\n"):
        return None, 0
    try:
        line = json.loads(text)
        ends = [sum(piece) for *_, pieces in line["arrays"].values() for piece in pieces]
    except MALFORMED:
        return None, 0
    return line, max(ends, default=0)


def _in_order(leaf: Any) -> list[tuple[Any, int | None]]:
    """The arrays of a leaf and their bits, in the order in which an Encoder stores them."""
    found: list[tuple[Any, int | None]] = []

    def keep(array: Any, bits: int | None) -> Any:
        found.append((array, bits))
        return array

    Encoder(keep).encode(leaf, "leaf")
    return found
