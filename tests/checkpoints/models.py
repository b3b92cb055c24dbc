"""Quantized models made in NumPy from the specifications: tensors and expected weights."""

from typing import Any

import ml_dtypes
import numpy as np

from .folders import open_model
from .packers import awq_words, bit_stream

RNG = np.random.default_rng(1)
K, N, G = 32, 16, 8
AWQ = {"quant_method": "awq", "bits": 4, "group_size": G, "zero_point": True, "version": "gemm"}


def scales(rows=K // G):
    return RNG.uniform(0.5, 2, (rows, N)).astype(np.float16)


def config_of(quantization):
    return {"torch_dtype": "float32", "quantization_config": quantization}


def open_quantized(tmp_path, quantization, tensors):
    return open_model(tmp_path, config_of(quantization), tensors)


def random_scale(*shape):
    return RNG.uniform(0.5, 2, shape).astype(np.float32)


def dense(codes, zero, scale, groups):
    """(N, K) float32 from (K, N) codes and (K / G, N) zero points and scales."""
    values = (codes - zero[groups]).astype(np.float32) * scale.astype(np.float32)[groups]
    return values.T


def awq_model():
    codes, zero = RNG.integers(0, 16, (K, N)), RNG.integers(0, 16, (K // G, N))
    scale = scales()
    tensors = {"qweight": awq_words(codes), "qzeros": awq_words(zero), "scales": scale}
    expected = dense(codes, zero, scale, np.arange(K) // G)
    bias = np.ones(N, np.float32)
    return {f"a.q_proj.{n}": x for n, x in {**tensors, "bias": bias}.items()}, expected


def gptq_config(bits=4, **fields):
    base = {"quant_method": "gptq", "bits": bits, "group_size": G, "desc_act": False, "sym": False}
    return {**base, "checkpoint_format": "gptq", **fields}


def gptq_model(bits=4, minus=1, zero=None, groups=None) -> tuple[dict[str, Any], Any]:
    count = 1 << bits
    codes = RNG.integers(0, count, (K, N))
    zero = RNG.integers(0, count, (K // G, N)) if zero is None else np.full((K // G, N), zero)
    groups = np.arange(K) // G if groups is None else groups
    scale = scales()
    tensors = {
        "qweight": bit_stream(codes.T, bits, np.int32).T,
        "qzeros": bit_stream((zero - minus) % count, bits, np.int32),
        "scales": scale,
        "g_idx": groups.astype(np.int32),
    }
    return {f"a.q_proj.{n}": x for n, x in tensors.items()}, dense(codes, zero, scale, groups)


# Values of 4-bit floats in the order of their codes.
FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
FLOAT4 = np.concatenate([FLOAT4, -FLOAT4])


def modelopt_config(algorithm):
    return {"quant_method": "modelopt", "quant_algo": algorithm, "exclude_modules": ["lm_head"]}


def modelopt_model(algorithm) -> tuple[dict[str, Any], Any]:
    """Tensors of a weight (8, 64), and its values in float32."""
    tensors, expected = _MODELOPT[algorithm]()
    return {f"a.{name}": x for name, x in tensors.items()}, expected


def float8(*shape):
    return RNG.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)


def _nvfp4():
    codes, inner = RNG.integers(0, 16, (8, 64)), np.abs(float8(8, 4))
    factor = np.float32(0.0123)
    tensors = {"weight": bit_stream(codes, 4, np.uint8), "weight_scale": inner}
    tensors |= {"weight_scale_2": factor, "input_scale": np.float32(0.5)}
    tensors["pre_quant_scale"] = RNG.uniform(0.5, 2, 64).astype(np.float32)
    scale = inner.astype(np.float32) * factor
    return tensors, FLOAT4[codes] * np.repeat(scale, 16, 1)


def _fp8():
    codes, scale = float8(8, 64), np.float32(0.3)
    tensors = {"weight": codes, "weight_scale": scale, "input_scale": np.float32(0.5)}
    return tensors, codes.astype(np.float32) * scale


def _fp8_rows():
    codes, scale = float8(8, 64), RNG.uniform(1, 2, 8).astype(np.float32)
    return {"weight": codes, "weight_scale": scale}, codes.astype(np.float32) * scale[:, None]


def _mxfp8():
    codes, exponents = float8(8, 64), RNG.integers(110, 140, (8, 2)).astype(np.uint8)
    scale = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
    return (
        {"weight": codes, "weight_scale": exponents},
        codes.astype(np.float32) * np.repeat(scale, 32, 1),
    )


def _int4():
    codes, scale = RNG.integers(-8, 8, (8, 64)), RNG.uniform(1, 2, (8, 4)).astype(np.float16)
    words = bit_stream((codes % 16).T, 4, np.uint8).T
    values = codes.astype(np.float32) * np.repeat(scale.astype(np.float32), 16, 1)
    return {"weight": words, "weight_scale": scale}, values


def _int8():
    codes = RNG.integers(-128, 128, (8, 64)).astype(np.int8)
    scale = RNG.uniform(1, 2, 8).astype(np.float32)
    return {"weight": codes, "weight_scale": scale}, codes.astype(np.float32) * scale[:, None]


_MODELOPT = {
    "NVFP4": _nvfp4,
    "FP8": _fp8,
    "FP8_PER_CHANNEL_PER_TOKEN": _fp8_rows,
    "MXFP8": _mxfp8,
    "W4A16_AWQ": _int4,
    "W8A8_SQ_PER_CHANNEL": _int8,
}


def made_cases(family):
    """As `golden_cases`, for formats whose reference libraries need a GPU."""
    found = {
        "awq": [(AWQ, awq_model())],
        "gptq": [(gptq_config(bits), gptq_model(bits)) for bits in (2, 3, 4, 8)]
        + [
            (gptq_config(sym=True), gptq_model(zero=8)),
            (
                gptq_config(desc_act=True),
                gptq_model(groups=RNG.permutation(np.arange(K) // G)),
            ),
        ],
        "modelopt": [(modelopt_config(a), modelopt_model(a)) for a in _MODELOPT],
    }[family]
    for i, (quantization, (tensors, _)) in enumerate(found):
        yield str(i), config_of(quantization), tensors, {}
