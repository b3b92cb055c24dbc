"""Reads a file or folder for `jaxquant inspect`."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from .. import checkpoints, tree
from ..tree.internal import is_safetensors, leaves_with_paths, read_tree, stored_sqnr
from .rows import InspectedTensor, of_checkpoint, of_tree


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file or folder holds.

    Attributes:
        path: of the file or folder.
        report: what it holds, for a table or JSON values.
        leaves: those of the tree in it, in the order of the report; empty for other files.
    """

    path: Path
    report: tree.Report | checkpoints.CheckpointReport
    leaves: tuple[Any, ...] = ()

    @property
    def elsewhere(self) -> str:
        """What `bytes_elsewhere` of the rows counts."""
        return "before quantization" if isinstance(self.report, tree.Report) else "in the file"

    def rows(self) -> tuple[InspectedTensor, ...]:
        """The tensors, as a page shows them."""
        if isinstance(self.report, tree.Report):
            return tuple(map(of_tree, self.report.rows, self.leaves))
        return tuple(map(of_checkpoint, self.report.rows))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the SQNR of each leaf and the codes' histogram of each scheme into a picture.

        Raises:
            ValueError: the file does not hold a tree, or no leaf of it is quantized.
        """
        if not isinstance(self.report, tree.Report):
            raise ValueError(
                f"--plot needs a safetensors file; got {self.path}. Quantize it first."
            )
        self.report.plot(os.fspath(path))


def read(path: Path) -> Contents:
    """Reads what a file or folder holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is malformed.
    """
    if path.is_dir() or not is_safetensors(path):
        return Contents(path, checkpoints.open(path).report())
    params, metadata = read_tree(path)
    known = stored_sqnr(path, metadata)
    found = tree.report(None, params).rows
    rows = tuple(dataclasses.replace(r, sqnr=known.get(r.path)) for r in found)
    _, leaves, _ = leaves_with_paths(params)
    return Contents(path, tree.Report(rows), tuple(leaves))


def verify(path: Path) -> str:
    """Compares each tensor of a file with its checksum; returns what it found, as a sentence.

    Raises:
        OSError: it cannot be read.
        ValueError: a tensor was altered, or the file has no checksums.
    """
    if not checkpoints.open(path).is_tree:
        raise ValueError(
            f"--verify needs a file of jaxquant.save, which has checksums; got {path}. Leave "
            "--verify out."
        )
    found = tree.verify(path)
    altered = [name for name, is_intact in found.items() if not is_intact]
    if altered:
        names = ", ".join(altered)
        raise ValueError(f"{len(altered)} of {len(found)} tensors of {path} were altered: {names}.")
    return f"All {len(found)} tensors of {path} match their checksums."
