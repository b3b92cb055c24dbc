"""The tensors of GGUF files with what belongs to each of them."""

import os
from typing import Any, NamedTuple

import numpy as np

from .container import Container, TensorInfo, read_containers
from .names import NAMES, Renamed


class Entry(NamedTuple):
    """A tensor of a file, what it is called, and the tensor that holds a factor of its scales."""

    info: TensorInfo
    renamed: Renamed
    factor: TensorInfo | None


def read_entries(
    path: str | os.PathLike[str], names: str
) -> tuple[list[Container], dict[str, Entry]]:
    """The files of a model, and its tensors by name. `names` is that of `open_gguf`.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: as for `open_gguf`.
    """
    if names not in NAMES:
        raise ValueError(f"names must be one of {', '.join(map(repr, NAMES))}; got {names!r}.")
    containers = read_containers(path)
    rename = NAMES[names](path, containers[0].metadata)
    infos = {t.name: t for c in containers for t in c.tensors}
    factors = {name: _factor(info, infos, path) for name, info in infos.items()}
    used = {factor.name for factor in factors.values() if factor is not None}
    entries: dict[str, Entry] = {}
    for name, info in infos.items():
        if name in used:
            continue
        renamed = rename(name, info.shape)
        if renamed.name in entries:
            raise ValueError(
                f"{path}: name of tensor: {name!r} and another tensor are both {renamed.name!r} in "
                "Hugging Face's names. Open it with names='stored'."
            )
        if renamed.shift and info.type.format is not None:
            raise ValueError(
                f"{path}: type of {name!r}: must be a float type, because the file adds "
                f"{renamed.shift} to it; got {info.type}. Open it with names='stored'."
            )
        entries[renamed.name] = Entry(info, renamed, factors[name])
    return containers, entries


def _factor(tensor: TensorInfo, infos: dict[str, TensorInfo], path: Any) -> TensorInfo | None:
    """One number for the tensor, or one for each of its matrices (per expert)."""
    if not tensor.type.has_factor:
        return None
    names = (f"{tensor.name.removesuffix('.weight')}.scale", f"{tensor.name}.scale")
    factor = next((infos[name] for name in names if name in infos), None)
    if factor is None:
        return None
    has_shape = factor.raw.size == factor.type.nbytes or factor.shape == tensor.shape[:-2]
    if not has_shape or factor.type.codes.dtype != np.float32:
        raise ValueError(
            f"{path}: shape of {factor.name!r}: must be one F32 number, or one per matrix of "
            f"{tensor.name!r}, {tensor.shape}; got {factor.type} {factor.shape}. The file is "
            "damaged; copy it again."
        )
    return factor
