"""A checkpoint: named tensors in files, read when they are loaded."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from ..tree import Progress
from .load import Shardings, load
from .report import CheckpointReport, rows_of
from .stored import Stored


@dataclasses.dataclass(frozen=True)
class Checkpoint(Mapping[str, Stored]):
    """The tensors of a checkpoint by name. Nothing but headers has been read.

    Attributes:
        path: file or folder.
        container: how it is stored, such as "gguf".
        tensors: by name.
        is_tree: whether `jaxquant.save` wrote it, so that `jaxquant.load` restores a tree.
        metadata: what the file says about the model: configuration, tokenizer, quantization.
    """

    path: Path
    container: str
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_tree: bool = False

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
        return f"Checkpoint({str(self.path)!r}, {self.container}, tensors={len(self)})"

    def load(
        self,
        wanted: Any = None,
        *,
        sharding: Shardings | Any = None,
        dtype: jax.typing.DTypeLike | None = None,
        progress: Progress | bool | None = None,
    ) -> Any:
        """Reads tensors and puts them on devices, one after another.

        Args:
            wanted: names of tensors; or a tree of names; or a tree of arrays, such as one from
                `jax.eval_shape`, whose paths joined by dots are the names. A matrix whose shape in
                the tree is that of the file with its last two axes swapped, as kernels (in, out)
                are in JAX, is loaded with another `order` of the same stored codes. None for all.
            sharding: a sharding for all tensors; a function of (name, shape) that returns one, or
                None; or a tree of them like the result. Each device's slice is read from the file
                when it is put there, so host memory holds one slice at a time, and each process
                reads only the slices of its devices.
            dtype: floating dtype of float arrays, and of what QTensors dequantize to; None for
                those of the file.
            progress: True for a progress bar on standard error, or a function of (tensors done,
                tensors in all, name); None for neither.

        Returns:
            A dict by name for names, else a tree like `wanted`, of arrays and QTensors.

        Raises:
            ValueError: a name is not in the checkpoint, a shape differs, a part of a file is
                malformed, or a mesh does not divide an axis.

        Example:
            >>> jq.save("model.safetensors", jq.tree.quantize({"w": jnp.ones((64, 8))}, jq.W8A8))
            >>> jq.checkpoints.open("model.safetensors").load(["w"])
            {'w': QTensor(int8 64x8, scale (1, 8), float32)}
        """
        return load(self.tensors, wanted, sharding, dtype, progress)

    def report(self) -> CheckpointReport:
        """Per tensor: how it is stored, what it becomes, and whether that is exact, or why not."""
        return CheckpointReport(str(self.path), rows_of(self.tensors.values()))
