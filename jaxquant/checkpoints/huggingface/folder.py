"""Folders of safetensors files with their configuration, as the Hugging Face Hub has them."""

import dataclasses
import os
from pathlib import Path
from typing import NoReturn

import jax.numpy as jnp

from .fields import Fields, read_json
from .mapped import Tensor, map_tensors

# Fields of config.json that say how a model is quantized, and the methods that do not name
# themselves there.
QUANTIZATION_KEYS = {
    "quantization_config": "mlx",
    "compression_config": "compressed-tensors",
    "quantization": "mlx",
}
# Files that say it, beside config.json or instead of it.
OTHER_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq"}
# The part of config.json about the language model, where there are others.
TEXT = "text_config"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class Folder:
    """The tensors and the configuration of a model.

    Attributes:
        path: that was opened: a folder or a file.
        tensors: by name, as stored.
        config: config.json; without values if there is none.
        others: other JSON files of the folder that say how it is quantized, by file name.
        header: strings of the headers of the tensor files.
    """

    path: Path
    tensors: dict[str, Tensor]
    config: Fields
    others: dict[str, Fields]
    header: dict[str, str]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the model's activations; bfloat16 if config.json does not say."""
        sections = self.config, self.config.section(TEXT)
        names = [
            fields.one_of(key, _DTYPES)
            for fields in sections
            for key in ("dtype", "torch_dtype")
            if key in fields
        ]
        return jnp.dtype(names[0] if names else jnp.bfloat16)


def open_files(path: Path) -> Folder:
    """Maps the tensor files of a folder, of an index, or a single file.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: a file is malformed, or no safetensors file is found.
    """
    target = _choose(path) if path.is_dir() else path
    if target.suffix in _PICKLES:
        _raise_for_pickles(path, [target.name])
    if target.name.endswith(".json"):
        tensors, header = _read_index(target)
    else:
        tensors, header = map_tensors(target)
    folder = target.parent
    config = folder / CONFIG
    others = {name: read_json(folder / name) for name in OTHER_FILES if (folder / name).is_file()}
    found = read_json(config) if config.is_file() else Fields(config, {})
    return Folder(path, tensors, found, others, header)


def _choose(folder: Path) -> Path:
    """The file of a folder to open."""
    for name in (INDEX, SINGLE):
        if (folder / name).is_file():
            return folder / name
    names = sorted(p.name for p in folder.iterdir())
    indices = [n for n in names if n.endswith(_INDEX_SUFFIX)]
    files = [n for n in names if n.endswith(".safetensors")]
    pickles = [n for n in names if n.endswith(_PICKLES)]
    for found in (indices, files):
        if len(found) == 1:
            return folder / found[0]
    if not files and pickles:
        _raise_for_pickles(folder, pickles)
    raise ValueError(
        f"{folder} must have {INDEX} or {SINGLE}; got {', '.join(names[:8]) or 'no files'}. Name "
        "one file, or copy the index too."
    )


def _raise_for_pickles(path: Path, names: list[str]) -> NoReturn:
    raise ValueError(
        f"{path} holds pickled weights, {', '.join(names[:3])}, and unpickling runs any code in "
        "the file. Save the model as safetensors: model.save_pretrained(folder, "
        "safe_serialization=True) in transformers."
    )


def _read_index(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that an index lists, each from the file that it names."""
    index = read_json(path)
    places = index.section("weight_map")
    files: dict[str, dict[str, Tensor]] = {}
    tensors, header = {}, {}
    for name in places.values:
        file = places.text(name)
        # Names of other folders would read files that do not belong to the model.
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise places.invalid(name, "the name of a .safetensors file in the same folder")
        if not os.path.isfile(path.parent / file):
            raise ValueError(f"{path} lists {file!r}, which is not in its folder. Copy it there.")
        if file not in files:
            files[file], strings = map_tensors(path.parent / file)
            header |= strings
        if name not in files[file]:
            raise ValueError(
                f"{path.parent / file} has no tensor {name!r}, which {path.name} says it has. "
                "Copy both again."
            )
        tensors[name] = files[file][name]
    if not tensors:
        raise index.invalid("weight_map", "a table of tensors and their files")
    return tensors, header
