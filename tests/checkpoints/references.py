"""Checkpoints made and decoded by the libraries that others use, for golden files.

Run by hand, with those libraries installed: python -m tests.checkpoints.references. It needs
torch, compressed-tensors, bitsandbytes, transformers, mlx[cpu] and safetensors, and writes
tests/checkpoints/golden. test_huggingface_references.py runs the same cases where they are
installed.
"""

import importlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

GOLDEN = Path(__file__).parent / "golden"


class Case(NamedTuple):
    """A checkpoint: config.json, tensors by name, and weights as the reference decodes them."""

    config: dict[str, Any]
    tensors: dict[str, Any]
    expected: dict[str, Any]


def compressed_tensors() -> dict[str, Case]:
    """Each format of compressed-tensors, in models of several dtypes."""
    cases = {}
    for bits in range(2, 9):
        for symmetric in (True, False):
            args = {"num_bits": bits, "strategy": "group", "group_size": 32}
            dtype = ("bfloat16", "float16", "float32")[bits % 3]
            name = f"pack {bits} bits {'symmetric' if symmetric else 'asymmetric'} {dtype}"
            args["symmetric"] = symmetric
            cases[name] = _compressed("pack-quantized", args, (9, 64), dtype)
    cases |= {
        "pack channel": _compressed(
            "pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}, (9, 40)
        ),
        "int8 channel": _compressed(
            "int-quantized", {"num_bits": 8, "strategy": "channel"}, (5, 48)
        ),
        "int8 asymmetric tensor": _compressed(
            "naive-quantized", {"num_bits": 8, "strategy": "tensor", "symmetric": False}, (5, 48)
        ),
        "fp8 channel": _compressed("float-quantized", _fp8("channel"), (5, 48)),
        "fp8 tensor": _compressed("naive-quantized", _fp8("tensor"), (5, 48), "float16"),
        "fp8 ragged blocks": _compressed(
            "float-quantized", {**_fp8("block"), "block_structure": [8, 16]}, (20, 56)
        ),
        "mxfp8": _compressed(
            "mxfp8-quantized",
            {**_fp8("group"), "group_size": 32, "scale_dtype": "torch.uint8"},
            (5, 64),
        ),
        "mxfp4": _compressed(
            "mxfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
            (5, 64),
        ),
        "nvfp4": _compressed(
            "nvfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
            (5, 64),
        ),
    }
    return cases


def _fp8(strategy):
    return {"num_bits": 8, "type": "float", "strategy": strategy}


def _compressed(form, args, shape, dtype="bfloat16") -> Case:
    torch: Any = importlib.import_module("torch")
    compressors: Any = importlib.import_module("compressed_tensors.compressors")
    quantization: Any = importlib.import_module("compressed_tensors.quantization")
    full = quantization.QuantizationArgs(**args)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=full)
    weight = _normal(shape, sum(map(ord, form)) + full.num_bits).to(getattr(torch, dtype))
    state = {"weight": weight, **_parameters(weight, full)}
    compressor = compressors.BaseCompressor.get_value_from_registry(form)
    compressed = compressor.compress(dict(state), scheme)
    decoded = compressor.decompress(dict(compressed), scheme)["weight"]
    config = {
        "torch_dtype": dtype,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": json.loads(full.model_dump_json()),
                    "input_activations": None,
                }
            },
        },
    }
    tensors = {f"model.layer.{name}": tensor for name, tensor in compressed.items()}
    tensors["model.layer.bias"] = _normal(shape[:1], 3)
    return Case(config, tensors, {"model.layer.weight": decoded})


def _normal(shape, seed):
    torch: Any = importlib.import_module("torch")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _parameters(weight, args) -> dict[str, Any]:
    """Scales, zero points and the order of groups of a weight."""
    torch: Any = importlib.import_module("torch")
    helpers: Any = importlib.import_module("compressed_tensors.quantization.utils.helpers")
    rows, columns = weight.shape
    found = {}
    strategy = str(args.strategy)
    block = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "block": tuple(args.block_structure or ()),
    }.get(strategy, (1, args.group_size))
    grid = [math.ceil(n / b) for n, b in zip(weight.shape, block, strict=True)]
    pieces = [
        weight[block[0] * i : block[0] * (i + 1), block[1] * j : block[1] * (j + 1)]
        for i in range(grid[0])
        for j in range(grid[1])
    ]
    low = torch.stack([p.min() for p in pieces]).reshape(grid)
    high = torch.stack([p.max() for p in pieces]).reshape(grid)
    if strategy == "tensor_group":
        factor = helpers.generate_gparam(low.min().float(), high.max().float())
        found["weight_global_scale"] = factor.reshape(1)
    scale, zero = helpers.calculate_qparams(low, high, args, found.get("weight_global_scale"))
    if strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    found["weight_scale"] = scale
    if not args.symmetric:
        found["weight_zero_point"] = zero.to(torch.int8)
    return found


FAMILIES = {"compressed_tensors": compressed_tensors}
# The package that each needs, beside torch.
PACKAGES = {"compressed_tensors": "compressed_tensors"}


def write(family: str, folder: Path) -> Path:
    """Writes the golden file of a family: tensors "case|name" and "case||expected name"."""
    save_file = importlib.import_module("safetensors.torch").save_file
    tensors, configs = {}, {}
    for case, (config, stored, expected) in FAMILIES[family]().items():
        configs[case] = json.dumps(config)
        tensors |= {f"{case}|{name}": x.contiguous().clone() for name, x in stored.items()}
        tensors |= {f"{case}||{name}": x.contiguous().clone() for name, x in expected.items()}
    path = folder / f"{family}.safetensors"
    save_file(tensors, path, configs)
    return path


if __name__ == "__main__":
    for each in FAMILIES:
        path = write(each, GOLDEN)
        print(path, path.stat().st_size)
