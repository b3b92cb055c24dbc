"""Folders of safetensors files for tests."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import QTensor
from jaxquant.checkpoints import Checkpoint, Source, open_folder
from jaxquant.tree.internal import read_arrays, write_tensors

GOLDEN = Path(__file__).parent / "golden"


def write_file(path, tensors, header=None):
    with open(path, "wb") as file:
        arrays = {name: np.asarray(x, order="C") for name, x in tensors.items()}
        write_tensors(file, arrays, header or {})


def write_folder(folder, config, tensors, header=None):
    """A folder with one file, opened."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_file(folder / "model.safetensors", tensors, header)
    return folder


def open_model(tmp_path, config, tensors):
    """The checkpoint of a folder with the tensors that are not None."""
    given = {name: x for name, x in tensors.items() if x is not None}
    return open_folder(write_folder(tmp_path / "model", config, given))


def golden_cases(family, folder=GOLDEN):
    """Case by name: configuration, tensors, and expected weights."""
    path = folder / f"{family}.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    arrays = read_arrays(path)
    for case, config in header.items():
        own = {n.removeprefix(f"{case}|"): x for n, x in arrays.items() if n.startswith(f"{case}|")}
        expected = {n.removeprefix("|"): x for n, x in own.items() if n.startswith("|")}
        tensors = {n: x for n, x in own.items() if not n.startswith("|")}
        yield case, json.loads(config), tensors, expected


def golden(family, case) -> Any:
    """Configuration, tensors and expected weights of a case."""
    return next(rest for name, *rest in golden_cases(family) if name == case)


def loaded(value) -> Any:
    """The QTensor or array of a Stored, with arrays on the device."""
    return jax.tree.map(
        lambda x: x.put() if isinstance(x, Source) else x,
        value,
        is_leaf=lambda x: isinstance(x, Source),
    )


def value_of(checkpoint: Checkpoint, name: str) -> Any:
    """The Source or QTensor of Sources of a tensor."""
    return checkpoint[name].value


def values_of(checkpoint: Checkpoint, name: str, dtype: Any = None) -> np.ndarray:
    """The dequantized tensor in a dtype, its columns in the order of the unquantized model."""
    value = loaded(checkpoint[name].value)
    if not isinstance(value, QTensor):
        return np.asarray(value)
    dense = np.asarray((value if dtype is None else value.astype(dtype)).dequantize())
    inputs = value.inputs
    if inputs is not None and inputs.permutation is not None:
        dense = dense[..., np.argsort(np.asarray(inputs.permutation))]
    return dense


def float32_values(path) -> dict[str, np.ndarray]:
    """All tensors of a folder in float32."""
    checkpoint = open_folder(path)
    return {name: values_of(checkpoint, name, jnp.float32) for name in checkpoint}
