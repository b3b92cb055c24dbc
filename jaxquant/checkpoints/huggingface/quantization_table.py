"""The `quantization_config` of a folder that is written, collected weight by weight."""

import json
from typing import Any

import numpy as np

from ...core import NVFP4, QTensor
from ...tree.internal import DTYPES, METADATA
from .logical import as_numpy
from .to_compressed import to_compressed
from .to_modelopt import ALGORITHM, to_modelopt

_DTYPES = {np.dtype(dtype).name for dtype in DTYPES.values()}


class QuantizationTable:
    """Which modules are quantized in which way, and which are left in float.

    Attributes:
        groups: entry of config_groups and names of its modules, by the entry's text.
        floats: modules with a matrix in float.
        nested: modules in NVFP4.
        names: of all tensors.
    """

    def __init__(self):
        self.groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
        self.floats: list[str] = []
        self.nested: list[str] = []
        self.names: set[str] = set()

    def encode(self, name: str, value: Any) -> dict[str, np.ndarray]:
        """The tensors of an array or a quantized weight, by their names in the file.

        Raises:
            ValueError: files cannot hold it under this name, or beside what was encoded before.
        """
        if not isinstance(name, str) or name == METADATA:
            raise ValueError(
                f"Names of parameters must be strings other than {METADATA!r}; got {name!r}. "
                "Name each by its path in the model, such as 'layers.0.q_proj.weight'."
            )
        tensors = self._encode(name, value)
        if twice := self.names & set(tensors):
            raise ValueError(f"Two parameters would be written as {min(twice)!r}; rename one.")
        self.names |= set(tensors)
        return tensors

    def _encode(self, name, value):
        module = name.removesuffix(".weight")
        if not isinstance(value, QTensor):
            array = as_numpy(value)
            if array.dtype.name not in _DTYPES:
                raise ValueError(
                    f"{name} must be an array whose dtype safetensors has, or a QTensor; got "
                    f"{type(value).__name__}, {array.dtype}. Convert it, such as to float32."
                )
            self.floats += [module] if array.ndim > 1 else []
            return {name: array}
        if value.format == NVFP4:
            self.nested += [module]
            tensors = to_modelopt(name, value)
        else:
            tensors, group = to_compressed(name, value)
            self.groups.setdefault(json.dumps(group), (group, []))[1].append(module)
        if self.nested and self.groups:
            raise ValueError(
                f"A folder has one method of quantization; got NVFP4 for {self.nested[0]!r}, and "
                f"another format for {next(iter(self.groups.values()))[1][0]!r}."
            )
        return {f"{module}.{end}": x for end, x in tensors.items()}

    def fields(self) -> dict[str, Any]:
        """The entry of config.json; empty if nothing is quantized."""
        # vLLM and transformers leave modules in float that are not among the quantized.
        ignore = sorted({*self.floats, "lm_head"} - {*self.nested, *self._quantized()})
        if self.nested:
            return {"quantization_config": _modelopt(ignore)}
        if not self.groups:
            return {}
        entries = list(self.groups.values())
        targets = [["Linear"]] if len(entries) == 1 else [modules for _, modules in entries]
        formats = {group["format"] for group, _ in entries}
        quantization = {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "ignore": ignore,
            "config_groups": {
                f"group_{i}": {"targets": target, "output_activations": None, **group}
                for i, (target, (group, _)) in enumerate(zip(targets, entries, strict=True))
            },
        }
        return {"quantization_config": quantization}

    def _quantized(self) -> list[str]:
        return [module for _, modules in self.groups.values() for module in modules]


def _modelopt(ignore: list[str]) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
    return {
        "quant_method": "modelopt",
        "quant_algo": ALGORITHM,
        "producer": {"name": "modelopt"},
        "group_size": 16,
        "ignore": ignore,
        "exclude_modules": ignore,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
