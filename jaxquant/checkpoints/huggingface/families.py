"""Opens a folder: chooses the reader of its quantization, and leaves other tensors plain."""

import os
from collections.abc import Callable
from pathlib import Path

from ..checkpoint import Checkpoint
from ..stored import Stored
from . import bitsandbytes, columns, compressed, gpt_oss, mlx, modelopt, scaled_float8
from .bitsandbytes import STATE
from .fields import Fields
from .folder import OTHER_FILES, QUANTIZATION_KEYS, TEXT, Folder, open_files
from .mapped import Tensor
from .module import Pool

# Dtypes of codes, and names of scales beside them.
_CODES = ("int8", "uint8", "uint32", "float8_e4m3fn", "float4_e2m1fn")
_SCALES = ("scale", "scales", "scale_weight", "biases")

Reader = Callable[[Pool, Fields], list[Stored]]

# Readers by the name that config.json gives in quant_method.
READERS: dict[str, Reader] = {
    "compressed-tensors": compressed.read,
    "fp8": scaled_float8.read,
    "fbgemm_fp8": scaled_float8.read_fbgemm,
    "mxfp4": gpt_oss.read,
    "modelopt": modelopt.read,
    "modelopt_fp4": modelopt.read,
    "awq": columns.read_awq,
    "gptq": columns.read_gptq,
    "bitsandbytes": bitsandbytes.read,
    "mlx": mlx.read,
    "metal": mlx.read,
}
_OTHER = "Choose the same model in another format, such as compressed-tensors, AWQ or GGUF"
# Methods that are recognised and not supported, and what to do instead.
UNSUPPORTED = {
    "aqlm": _OTHER,
    "vptq": _OTHER,
    "quip": _OTHER,
    "exl2": _OTHER,
    "spqr": _OTHER,
    "higgs": _OTHER,
    "fp_quant": _OTHER,
    "eetq": _OTHER,
    "marlin": _OTHER,
    "hqq": "Dequantize it with the package hqq and save the model in bfloat16",
    "quanto": "Dequantize it with optimum-quanto and save the model in bfloat16",
    "torchao": "Save it as compressed-tensors, or dequantized in bfloat16",
    "bitnet": "Choose the bfloat16 weights of the model",
    "quark": "Export it from AMD Quark in the format of compressed-tensors",
    "auto-round": "Export it from AutoRound in the format auto_gptq or auto_awq",
}
# Parts of quantized weights. If no reader has taken one, the rest of its weight is missing.
_PARTS = (
    ".weight_packed",
    ".weight_scale",
    ".weight_zero_point",
    ".weight_g_idx",
    ".weight_shape",
    ".weight_global_scale",
    ".weight_scale_2",
    ".weight_scale_inv",
    ".qscale_weight",
    ".pre_quant_scale",
    "_proj_blocks",
    "_proj_scales",
    ".qweight",
    ".qzeros",
    ".absmax",
    ".SCB",
)


def open_folder(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a folder of safetensors files, their index, or one such file. Reads headers only.

    The configuration in config.json says how weights are quantized. Small tensors that say how
    others are stored, such as shapes and orders of groups, are read too.

    Args:
        path: folder, model.safetensors.index.json, or .safetensors file.

    Returns:
        Weights as quantized arrays under the names that they have in the unquantized model, and
        all other tensors under their own names.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: a file is malformed, or the format of the quantization is not supported.
    """
    folder = open_files(Path(path))
    pool = Pool(folder)
    method, fields = _quantization(folder)
    found = [] if fields is None else _reader(method, fields)(pool, fields)
    stored = {item.name: item for item in found}
    for name, tensor in pool.rest.items():
        if name in stored:
            raise ValueError(f"{tensor.path} has the weight {name!r} quantized and in float.")
        stored[name] = _plain(folder, tensor, fields)
    metadata = {"config": dict(folder.config.values), "header": folder.header}
    return Checkpoint(folder.path, method or "safetensors", stored, metadata)


def _quantization(folder: Folder) -> tuple[str, Fields | None]:
    """The method and its configuration; "" and None for a model in float."""
    if any(STATE in name for name in folder.tensors):
        return "bitsandbytes", folder.config
    for fields in (folder.config, folder.config.section(TEXT)):
        for key, method in QUANTIZATION_KEYS.items():
            if fields.section(key).values:
                return fields.section(key).text("quant_method", method), fields.section(key)
    for name, method in OTHER_FILES.items():
        if name in folder.others:
            fields = folder.others[name]
            return method, fields.section("quantization") if "quantization" in fields else fields
    return "", None


def _reader(method: str, fields: Fields) -> Reader:
    if method in UNSUPPORTED:
        raise ValueError(
            f"{fields.path}: weights quantized with {method!r} cannot be read. "
            f"{UNSUPPORTED[method]}."
        )
    if method not in READERS:
        raise fields.invalid("quant_method", f"one of {', '.join(READERS)}")
    return READERS[method]


def _plain(folder: Folder, tensor: Tensor, fields: Fields | None) -> Stored:
    """A tensor that is not quantized."""
    why = "the rest of which is missing" if fields else "but no configuration says how"
    where = fields.path if fields else tensor.path.parent / "config.json"
    if tensor.name.endswith(_PARTS):
        raise ValueError(
            f"{tensor.path}: tensor {tensor.name!r} is part of a quantized weight, {why}. Check "
            f"{where} and download the model again."
        )
    is_narrow = len(tensor.shape) > 1 and tensor.dtype.name in _CODES
    prefix = tensor.name.removesuffix("weight")
    has_scale = any(prefix + name in folder.tensors for name in _SCALES)
    is_left = fields is not None and tensor.name.removesuffix(".weight") in fields.strings("ignore")
    if is_narrow and not is_left and (fields is not None or has_scale):
        raise ValueError(
            f"{tensor.path}: {tensor.name!r} has {tensor.dtype} elements, as if it were part of a "
            f"quantized weight, {why}. Check {where} and download the model again."
        )
    return Stored(tensor.name, tensor.dtype.name, tensor.source, tensor.nbytes)
