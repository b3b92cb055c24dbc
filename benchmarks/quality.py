"""Prints bits per weight and SQNR of every format on Gaussian weights, for docs/choosing.md.

python -m benchmarks.quality
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

import jaxquant as jq

_SHAPE = (64, 4096)


def _configs():
    int8, int4, int2 = (
        jq.ArrayConfig(format=f, group_size=g)
        for f, g in ((jq.INT8, None), (jq.INT4, 128), (jq.INT2, 64))
    )
    yield "INT8 per tensor", dataclasses.replace(int8, per_tensor=True)
    yield "INT8 per channel", int8
    yield "FP8 e4m3 per channel", dataclasses.replace(int8, format=jq.FP8_E4M3)
    yield "FP8 e5m2 per channel", dataclasses.replace(int8, format=jq.FP8_E5M2)
    yield "MXFP8", dataclasses.replace(int8, format=jq.MXFP8)
    yield "INT4 per channel", dataclasses.replace(int4, group_size=None)
    for group_size in (128, 32):
        grouped = dataclasses.replace(int4, group_size=group_size)
        yield f"INT4 g{group_size}", grouped
        yield f"INT4 g{group_size}, MinMSE", dataclasses.replace(grouped, range=jq.MinMSE())
        yield f"INT4 g{group_size} asymmetric", dataclasses.replace(grouped, symmetric=False)
    yield "NF4 g64", jq.ArrayConfig(format=jq.NF4, group_size=64)
    yield "MXFP4", jq.ArrayConfig(format=jq.MXFP4)
    yield "NVFP4", jq.ArrayConfig(format=jq.NVFP4)
    asymmetric = dataclasses.replace(int2, symmetric=False)
    yield "INT2 g64 asymmetric", asymmetric
    yield "INT2 g64 asymmetric, MinMSE", dataclasses.replace(asymmetric, range=jq.MinMSE())


def _sqnr(x, q):
    noise = x - q.dequantize()
    return 10 * math.log10(jnp.sum(x**2) / jnp.sum(noise**2))


def main():
    x = jax.random.normal(jax.random.key(0), _SHAPE)
    print("| | bits per weight | SQNR, dB |\n|---|---|---|")
    for name, config in _configs():
        q = jq.quantize(x, config, axis=1)
        print(f"| {name} | {8 * q.nbytes / q.size:.2f} | {_sqnr(x, q):.1f} |")


if __name__ == "__main__":
    main()
