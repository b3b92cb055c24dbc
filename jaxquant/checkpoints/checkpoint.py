"""A checkpoint: named tensors in files, read when they are loaded."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .stored import Stored


@dataclasses.dataclass(frozen=True)
class Checkpoint(Mapping[str, Stored]):
    """The tensors of a checkpoint by name. Nothing but headers has been read.

    Attributes:
        path: file or folder.
        container: how it is stored, such as "gguf".
        tensors: by name.
        metadata: what the file says about the model: configuration, tokenizer, quantization.
    """

    path: Path
    container: str
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Stored:
        if name not in self.tensors:
            known = ", ".join(list(self.tensors)[:6])
            raise KeyError(f"{self.path} has no tensor {name!r}; it has {known}, ...")
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {self.container}, {len(self)} tensors)"
