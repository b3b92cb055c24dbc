"""Writes Hugging Face folders with quantized weights, which vLLM and others read."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ...core import QTensor
from ...tree.internal import creating_folder, replacing, write_tensors
from ..source import Source
from .folder import CONFIG, INDEX, QUANTIZATION_KEYS, SINGLE, TEXT
from .quantization_table import QuantizationTable

Array = np.ndarray | jax.Array | Source


def write_folder(
    path: str | os.PathLike[str],
    params: Mapping[str, Array | QTensor],
    config: Mapping[str, Any],
    *,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model as a folder of safetensors files with its configuration.

    The folder appears whole or not at all. Codes, scales and zero points are written as they are:
    weights in NVFP4 in the naming of ModelOpt, and in integers, 8-bit floats, MXFP8 or MXFP4 as
    compressed-tensors. vLLM casts scales of packed weights to the dtype of the model, so quantize
    with that `scale_dtype`.

    Args:
        path: of the new folder.
        params: arrays, and quantized weights (N, K) = (out, in) in any storage order, by the names
            that the model of `config` has, such as "model.layers.0.mlp.up_proj.weight". One shard
            at a time is held in memory.
        config: what config.json says about the model; its quantization is replaced.
        shard_bytes: size of a file after which the next one starts.

    Raises:
        FileExistsError: there is something other than an empty folder at `path`.
        OSError: a file cannot be written.
        ValueError: a weight cannot be written exactly, or config is not JSON.

    Example:
        >>> config = jq.ArrayConfig(format=jq.INT4, group_size=32, scale_dtype="bfloat16")
        >>> weight = jq.quantize(jnp.ones((8, 64)), config, axis=1)
        >>> jq.checkpoints.write_folder("model", {"up_proj.weight": weight}, {"model_type": "toy"})
        >>> jq.checkpoints.open_folder("model")["up_proj.weight"].kind
        'compressed-tensors int4 group'
    """
    if not isinstance(config, Mapping):
        raise ValueError(
            f"config must be a mapping, that of config.json; got {config!r:.100}. Read the file "
            "with json.load."
        )
    table = QuantizationTable()
    with creating_folder(path) as folder:
        encoded = (table.encode(name, value) for name, value in params.items())
        places = _write_shards(folder, encoded, shard_bytes)
        if len(set(places.values())) > 1:
            _write_json(folder / INDEX, {"metadata": {}, "weight_map": places})
        _write_json(folder / CONFIG, _without_quantization(config) | table.fields())


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in config.items() if name not in QUANTIZATION_KEYS}
    if isinstance(own.get(TEXT), Mapping):
        own[TEXT] = _without_quantization(own[TEXT])
    return own


def _write_shards(
    folder: Path, encoded: Iterable[dict[str, np.ndarray]], most: int
) -> dict[str, str]:
    """Writes tensors to files of about `most` bytes. Returns the file of each."""
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    for tensors in encoded:
        size = sum(x.nbytes for x in (*held.values(), *tensors.values()))
        if held and size > most:
            _write_shard(folder, len(shards), held)
            shards += [list(held)]
            held = {}
        held |= tensors
    _write_shard(folder, len(shards), held)
    shards += [list(held)]
    places = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
        (folder / str(i)).rename(folder / file)
        places |= dict.fromkeys(names, file)
    return places


def _write_shard(folder: Path, number: int, tensors: dict[str, np.ndarray]) -> None:
    with replacing(folder / str(number)) as file:
        # transformers raises unless the header names a framework.
        arrays = {
            name: np.asarray(x, x.dtype.newbyteorder("<"), order="C") for name, x in tensors.items()
        }
        write_tensors(file, arrays, {"format": "pt"})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    try:
        text = json.dumps(values, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name} must be JSON ({error}); got {values!r:.200}.") from error
    with replacing(path) as file:
        file.write(text.encode())
