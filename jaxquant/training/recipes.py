"""Recipes of low-precision training: a `ProductConfig` each, with its source.

In all of them lhs are activations and rhs are weights. Leave the first and the last layers in
float.
"""

import dataclasses

from ..core import FP8_E4M3, FP8_E5M2, INT8, MXFP8, NVFP4, ArrayConfig
from .product_config import ProductConfig

_INT8 = ArrayConfig(format=INT8)
_E4M3 = ArrayConfig(format=FP8_E4M3, per_tensor=True)
_E5M2 = ArrayConfig(format=FP8_E5M2, per_tensor=True)
_TILE = ArrayConfig(format=FP8_E4M3, group_size=128)
_BLOCK = ArrayConfig(format=FP8_E4M3, group_size=(128, 128))
_MXFP8 = ArrayConfig(format=MXFP8)
_NVFP4 = ArrayConfig(format=NVFP4)
# The same codes and scales, for blocks of other shapes.
_E2M1 = dataclasses.replace(NVFP4, name="nvfp4_blocks", group_size=None)

INT8_TRAINING = ProductConfig(lhs=_INT8, rhs=_INT8, gradient=_INT8, rounds_stochastically=True)
"""All three products in int8, one scale per row or column, gradients rounded stochastically.

Unbiased gradients; pass a key.

Source: Chen et al. 2020 (StatQuant), arXiv:2010.14298, theorem 1.
"""

SWITCHBACK = ProductConfig(lhs=_INT8, rhs=_INT8, gradient=_INT8, quantizes_rhs_gradient=False)
"""int8 for out and the lhs gradient. The rhs gradient sums over all tokens and stays in float.

Source: Wortsman et al. 2023 (SwitchBackQ, with scales per row), arXiv:2304.13013, algorithm 1.
"""

FP8_TRAINING = ProductConfig(lhs=_E4M3, rhs=_E4M3, gradient=_E5M2)
"""e4m3 for activations and weights, e5m2 for gradients, one scale per tensor.

Current scaling; with a `DelayedScaling`, the scales are those of previous steps.

Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3.
"""

FP8_BLOCKS = ProductConfig(lhs=_TILE, rhs=_BLOCK, gradient=_TILE)
"""e4m3 throughout: tiles of 128 elements for activations and gradients, 128 x 128 for weights.

Tiles lie along the contracted axis of each product: 1 x 128 in out and in the lhs gradient, and
128 x 1, along tokens, in the rhs gradient. Scales are float32. Activations for the rhs gradient are
quantized from their values, not from the codes for out.

Source: DeepSeek-AI 2024 (DeepSeek-V3), arXiv:2412.19437, section 3.3.2.
"""

MXFP8_TRAINING = ProductConfig(lhs=_MXFP8, rhs=_MXFP8, gradient=_MXFP8, rounds_scales_up=True)
"""e4m3 throughout, in groups of 32 along the contracted axis of each product.

Scales are powers of two, rounded up, so that no element is clipped; the rule of the format rounds
them down, with which training may diverge.

Source: Open Compute Project, Microscaling Formats (MX) v1.0; scales and e4m3 for gradients: Mishra
et al. 2025, arXiv:2506.08027, section 3.
"""

NVFP4_TRAINING = ProductConfig(
    lhs=_NVFP4,
    rhs=ArrayConfig(format=_E2M1, group_size=(16, 16)),
    gradient=_NVFP4,
    rounds_stochastically=True,
    rhs_gradient_rotation=16,
)
"""4-bit floats (e2m1): groups of 16 for activations and gradients, 16 x 16 blocks for weights.

Groups have e4m3 scales under a float32 scale per matrix. In the rhs gradient, both operands are
multiplied by a random Hadamard matrix of order 16 along tokens, with the same signs everywhere.
Gradients are rounded stochastically, pass a key; their scales are rounded up, so that no gradient
is clipped, where the paper rounds them to nearest. Leave about 15 % of the layers in bfloat16 by
rules, those near the end above all.

Source: NVIDIA 2025, arXiv:2509.25149, section 4 and appendix C.
"""
