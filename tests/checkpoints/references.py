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


def decompressed(config: dict[str, Any], tensors: dict[str, Any], module: str) -> Any:
    """The weight of a module of a folder, float32, as compressed-tensors decodes it."""
    torch: Any = importlib.import_module("torch")
    compressors: Any = importlib.import_module("compressed_tensors.compressors")
    quantization: Any = importlib.import_module("compressed_tensors.quantization")
    full = quantization.QuantizationConfig(**config["quantization_config"])
    schemes = full.config_groups.values()
    scheme = next(s for s in schemes if {"Linear", module} & set(s.targets))
    state = {
        name.removeprefix(f"{module}."): torch.as_tensor(x)
        for name, x in tensors.items()
        if name.startswith(f"{module}.")
    }
    compressor = compressors.BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.decompress(state, scheme)["weight"].float()


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


def float8() -> dict[str, Case]:
    """Blocks of 8-bit floats and of two 4-bit floats in a byte, decoded by transformers."""
    torch: Any = importlib.import_module("torch")
    module: Any = importlib.import_module("transformers.integrations.finegrained_fp8")
    decode = module.Fp8Dequantize(None)._dequantize_one
    codes = _normal((16, 64), 1).clamp(-2, 2).mul(200).to(torch.float8_e4m3fn)
    exponents = torch.arange(120, 136, dtype=torch.uint8)
    experts = torch.randint(-128, 128, (4, 32), generator=torch.Generator().manual_seed(0))
    pairs = {
        "blocks": (codes, _normal((2, 4), 2), "weight_scale_inv"),
        "tensor": (codes, torch.tensor(0.25), "weight_scale_inv"),
        "rows": (codes, _normal((16, 1), 3), "weight_scale"),
        "ue8m0 blocks": (codes, exponents[:8].reshape(2, 4).view(torch.float8_e8m0fnu), "scale"),
        "mxfp8": (codes, exponents[torch.arange(32) % 16].reshape(16, 2), "weight_scale_inv"),
        "fp4 experts": (
            experts.to(torch.int8),
            exponents[:8].reshape(4, 2).view(torch.float8_e8m0fnu),
            "weight_scale_inv",
        ),
    }
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 16]}
    return {
        case: Case(
            {"torch_dtype": "float32", "quantization_config": config},
            {"layer.weight": weight, f"layer.{name}": scale},
            {"layer.weight": decode(weight, scale, torch.float32)},
        )
        for case, (weight, scale, name) in pairs.items()
    }


def gpt_oss() -> dict[str, Case]:
    """MXFP4 blocks of gpt-oss, decoded by transformers."""
    torch: Any = importlib.import_module("torch")
    module: Any = importlib.import_module("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(110, 140, (2, 6, 3), generator=generator).to(torch.uint8)
    config = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        f"{name}_blocks": blocks,
        f"{name}_scales": scales,
        f"{name}_bias": _normal((2, 6), 1),
    }
    expected = {name: module.convert_moe_packed_tensors(blocks, scales)}
    return {"experts": Case({"quantization_config": config}, tensors, expected)}


def bitsandbytes() -> dict[str, Case]:
    """4-bit floats, nested or not, and int8, made and decoded by bitsandbytes."""
    torch: Any = importlib.import_module("torch")
    functional: Any = importlib.import_module("bitsandbytes.functional")
    cases = {}
    for kind, shape, is_nested, dtype in [
        ("nf4", (6, 128), False, torch.bfloat16),
        ("nf4", (6, 96), True, torch.float16),
        ("fp4", (5, 128), True, torch.float32),
        ("fp4", (4, 100), False, torch.float32),
    ]:
        weight = _normal(shape, shape[1]).to(dtype)
        packed, state = functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=is_nested, quant_type=kind
        )
        parts = {f"weight.{name}": x for name, x in state.as_dict(packed=True).items()}
        tensors = {f"layer.{name}": x for name, x in {"weight": packed, **parts}.items()}
        decoded = functional.dequantize_4bit(packed, state)
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        name = f"{kind} {'nested ' if is_nested else ''}{shape[1]} columns"
        cases[name] = Case({"quantization_config": config}, tensors, {"layer.weight": decoded})
    codes, scales, _ = functional.int8_vectorwise_quant(_normal((6, 40), 9).half())
    decoded = functional.int8_vectorwise_dequant(codes, scales)
    tensors = {
        "layer.weight": codes,
        "layer.SCB": scales,
        "layer.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    cases["int8"] = Case(
        {"torch_dtype": "float32", "quantization_config": config},
        tensors,
        {"layer.weight": decoded.float()},
    )
    return cases


def mlx() -> dict[str, Case]:
    """Each mode of MLX, made and decoded by MLX."""
    np: Any = importlib.import_module("numpy")
    torch: Any = importlib.import_module("torch")
    mx: Any = importlib.import_module("mlx.core")
    weight = mx.array(_normal((4, 128), 4).numpy()).astype(mx.bfloat16)
    cases = {}
    modes = [("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)]
    modes += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
    for mode, bits, size in modes:
        parts = mx.quantize(weight, group_size=size, bits=bits, mode=mode)
        # In float32, the product of a code and a scale is exact, so that only the sum rounds.
        wide = [x.astype(mx.float32) if x.dtype == mx.bfloat16 else x for x in parts]
        decoded = mx.dequantize(*wide, group_size=size, bits=bits, mode=mode, dtype=mx.float32)
        names = ("weight", "scales", "biases")
        tensors = {
            f"layer.{name}": torch.from_numpy(np.array(x))
            for name, x in zip(names, wide, strict=False)
        }
        for name in names[1:] if mode == "affine" else ():
            tensors[f"layer.{name}"] = tensors[f"layer.{name}"].to(torch.bfloat16)
        config = {"group_size": size, "bits": bits, "mode": mode}
        cases[f"{mode} {bits} bits"] = Case(
            {"torch_dtype": "float32", "quantization": config},
            tensors,
            {"layer.weight": torch.from_numpy(np.array(decoded.astype(mx.float32)))},
        )
    return cases


FAMILIES = {
    "compressed_tensors": compressed_tensors,
    "float8": float8,
    "gpt_oss": gpt_oss,
    "bitsandbytes": bitsandbytes,
    "mlx": mlx,
}
# The package that each needs, beside torch.
PACKAGES = {
    "compressed_tensors": "compressed_tensors",
    "float8": "transformers",
    "gpt_oss": "transformers",
    "bitsandbytes": "bitsandbytes",
    "mlx": "mlx.core",
}


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
