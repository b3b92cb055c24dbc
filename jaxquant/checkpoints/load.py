"""Tensors of a checkpoint on devices: which, in which form, and how they are divided."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import QTensor, refine_blocks, specs
from ..tree import Progress
from ..tree.internal import leaves_with_paths, progress_bar
from .source import Index, Source
from .stored import Stored

# A sharding for all, (name, shape) -> sharding, or None for the default device.
Shardings = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], Any] | None


def load(
    tensors: Mapping[str, Stored],
    wanted: Any,
    sharding: Any,
    dtype: jax.typing.DTypeLike | None,
    progress: Progress | bool | None,
) -> Any:
    """`Checkpoint.load`."""
    paths, names, shapes, treedef = _requests(tensors, wanted)
    values = [
        _oriented(tensors[name], shape, path)
        for path, name, shape in zip(paths, names, shapes, strict=True)
    ]
    placed = _placements(sharding, treedef, names, values)
    done = []
    with progress_bar(progress, len(names), "Loading") as report:
        for name, value, where in zip(names, values, placed, strict=True):
            # Otherwise the next would be read before the memory of this one is free.
            done += [jax.block_until_ready(put(value, where, dtype))]
            report(len(done), len(names), name)
    return jax.tree.unflatten(treedef, done)


def put(
    value: Source | QTensor,
    sharding: jax.sharding.Sharding | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Any:
    """A Source, or a QTensor of Sources, as arrays on devices.

    Args:
        value: what `Stored.value` holds, or what `stack` and `concatenate` made of several.
        sharding: of the whole array; None for the default device. A NamedSharding divides codes
            and block scales as `jaxquant.specs` says, after `jaxquant.refine_blocks`.
        dtype: floating dtype of a float array and of what a QTensor dequantizes to; None for the
            file's.

    Returns:
        Array or QTensor. Host memory holds the slice of one device at a time.
    """
    if isinstance(value, Source):
        return _cast(value, dtype).put(sharding)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        out = jax.tree.map(lambda source: source.put(sharding), value)
    else:
        value = refine_blocks(value, sharding.spec, sharding.mesh)
        of_arrays = specs(value, sharding.spec, sharding.mesh)
        out = jax.tree.map(lambda s, spec: s.put(sharding.update(spec=spec)), value, of_arrays)
    return out if dtype is None else out.astype(dtype)


def _cast(source: Source, dtype: jax.typing.DTypeLike | None) -> Source:
    """A Source of floats in another dtype, cast slice by slice."""
    if dtype is None or not jnp.issubdtype(source.dtype, jnp.floating):
        return source
    target = np.dtype(dtype)

    def reader(index: Index) -> np.ndarray:
        return source.read(index).astype(target)

    return Source(source.shape, target, reader)


def _requests(tensors: Mapping[str, Stored], wanted: Any) -> tuple[list, list, list, Any]:
    """Path, name and expected shape (or None) of each leaf, and the structure of the result."""
    if wanted is None:
        wanted = list(tensors)
    if isinstance(wanted, str):
        wanted = [wanted]
    if isinstance(wanted, Sequence) and all(isinstance(name, str) for name in wanted):
        wanted = {name: name for name in wanted}
    paths, leaves, treedef = leaves_with_paths(wanted)
    names = [
        leaf if isinstance(leaf, str) else path if path in tensors else path.replace("/", ".")
        for path, leaf in zip(paths, leaves, strict=True)
    ]
    missing = [name for name in names if name not in tensors]
    if missing:
        known = ", ".join(list(tensors)[:6])
        raise ValueError(
            f"{len(missing)} of {len(names)} tensors are not in the checkpoint, such as "
            f"{', '.join(missing[:4])}; it has {known}, ... Put their names into the tree as "
            "strings where they differ from its paths."
        )
    return paths, names, [getattr(leaf, "shape", None) for leaf in leaves], treedef


def _oriented(stored: Stored, shape: tuple[int, ...] | None, path: str) -> Source | QTensor:
    """The value in the wanted shape: as it is, or with its last two axes swapped."""
    value = stored.value
    if shape is None or tuple(shape) == value.shape:
        return value
    if tuple(shape) != (*value.shape[:-2], *value.shape[:-3:-1]):
        raise ValueError(
            f"{path}: the checkpoint stores {stored.name!r} with shape {value.shape}, and the "
            f"tree has shape {tuple(shape)} there. Give the tree the stored shape, or that with "
            "the last two axes swapped."
        )
    return swapped(value)


def swapped(value: Source | QTensor) -> Source | QTensor:
    """The same array with its last two axes swapped: another `order` for the same stored codes."""
    if isinstance(value, QTensor):
        order = None if value.order == (-1, -2) else (-1, -2)
        if value.order not in (None, (-1, -2)):
            raise ValueError(f"only matrices stored in either order can be turned; got {value!r}.")
        return dataclasses.replace(value, order=order)
    shape = (*value.shape[:-2], *value.shape[:-3:-1])

    def reader(index: Index) -> np.ndarray:
        return value.read((*index[:-2], *index[:-3:-1])).swapaxes(-1, -2)

    return Source(shape, value.dtype, reader)


def _placements(sharding, treedef, names, values) -> list[Any]:
    """The sharding of each leaf."""
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        return [sharding] * len(names)
    if callable(sharding):
        return [sharding(name, value.shape) for name, value in zip(names, values, strict=True)]
    leaves, found = jax.tree.flatten(sharding, is_leaf=lambda x: x is None)
    if found != treedef:
        raise ValueError(
            f"sharding must be a sharding, a function of (name, shape), or a tree like the result; "
            f"got {found}, and the result is {treedef}."
        )
    return leaves
