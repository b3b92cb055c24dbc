"""Which tensors of a file are as they were saved."""

import os

import numpy as np

from .files import has_checksum, map_tree
from .tensor_file import TensorFile


def verify(path: str | os.PathLike[str]) -> dict[str, bool]:
    """Compares each tensor of a file that `save` wrote with its checksum, a CRC-32.

    `load` raises an error at the first tensor that was altered; this reads all of them.

    Args:
        path: file to read, tensor by tensor.

    Returns:
        Whether each tensor has its checksum, by name in the file. Names begin with the path of the
        leaf in the tree.

    Raises:
        OSError, ValueError: as for `load`, but not for altered tensors.

    Example:
        >>> jq.save("model.safetensors", {"kernel": jnp.ones((4, 2))})
        >>> jq.tree.verify("model.safetensors")
        {'kernel': True}
    """
    found = {}

    def check(file: TensorFile, name: str, expected: int) -> None:
        found[name] = has_checksum(file.read(name), expected)

    map_tree(path, check, lambda *_: np.zeros(()))
    return found
