"""The cases that the whole suite uses. A number format joins them by its row in `FORMATS`."""

from typing import NamedTuple

import numpy as np

from jaxquant import (
    FORMATS,
    INT2,
    INT4,
    INT8,
    MXFP4,
    MXFP8,
    NF4,
    NVFP4,
    SCHEMES,
    ArrayConfig,
    MinMSE,
    Percentile,
)
from jaxquant import FP8_E4M3 as E4M3
from jaxquant import FP8_E5M2 as E5M2
from jaxquant.core import Axes

# Every case below is for arrays of this shape, with scales along axis 1 unless it names others.
SHAPE = (64, 256)


class Case(NamedTuple):
    """What `quantize` is called with beside the array: `quantize(x, *case)`."""

    config: ArrayConfig
    axis: Axes = 0


def as_case(case):
    """A Case from itself, or from a config for scales along axis 0."""
    return case if isinstance(case, Case) else Case(case)


def along(axis, **fields):
    """The Case of a config with these fields."""
    return Case(ArrayConfig(**fields), axis)


# For every format.
VARIANTS = {
    "row": {},
    "percentile": {"range": Percentile(99)},
    "min_mse": {"range": MinMSE()},
    "bfloat16_scales": {"scale_dtype": "bfloat16"},
    "nested_scales": {"scale_dtype": "float8_e4m3fn"},
}
# For formats that leave the group size to the config.
GROUPED = {
    "g128": {"group_size": 128},
    "g64": {"group_size": 64},
    "g32": {"group_size": 32},
    "tensor": {"per_tensor": True},
    "blocks": {"axis": (0, 1), "group_size": (16, 64)},
    "g32_float16_scales": {"group_size": 32, "scale_dtype": "float16"},
    "g32_e8m0_scales": {"group_size": 32, "scale_dtype": "float8_e8m0fnu"},
    "g32_nested_scales": {"group_size": 32, "scale_dtype": "float8_e4m3fn"},
}
# For integer formats.
ASYMMETRIC = {
    "asym_row": {},
    "asym_g64": {"group_size": 64},
    "asym_g32": {"group_size": 32},
    "asym_tensor": {"per_tensor": True},
    "asym_blocks": {"axis": (0, 1), "group_size": (16, 64)},
    "asym_percentile": {"range": Percentile(99)},
    "asym_min_mse": {"range": MinMSE(), "group_size": 64},
    "asym_bfloat16_scales": {"scale_dtype": "bfloat16"},
    "asym_nested_scales": {"group_size": 32, "scale_dtype": "float8_e4m3fn"},
}
# Formats share most of their code. Each of these is tested with the variants that its own part of
# the code meets; a format without a row here is tested with all.
SHORT = ("row", "asym_row", "asym_g32", "asym_blocks", "value_range")
INTEGERS = ("row", "percentile", "min_mse", "bfloat16_scales", "g128", "tensor", "blocks")
INTEGERS += ("g32_float16_scales", "g32_e8m0_scales", "g32_nested_scales", "value_range")
INTEGERS += tuple(name for name in ASYMMETRIC if name != "asym_g64")
FLOATS = ("row", "percentile", "min_mse", "bfloat16_scales", "blocks")
FLOATS += ("g32_float16_scales", "g32_e8m0_scales", "g32_nested_scales")
VARIANTS_OF = {
    INT4: INTEGERS,
    INT8: ("row", "percentile", "asym_row", "asym_tensor", "value_range"),
    INT2: ("row", "value_range", "asym_row", "asym_blocks"),
    E4M3: FLOATS,
    E5M2: ("row", "g64"),
    NF4: ("row", "min_mse", "bfloat16_scales", "g64", "tensor", "g32_nested_scales"),
    MXFP8: ("row", "percentile", "nested_scales"),
    MXFP4: ("row", "min_mse", "bfloat16_scales"),
    NVFP4: ("row", "percentile", "min_mse"),
}
# Variants of groups that formats with a codebook leave to INT4.
GROUPED_BY_INT4 = ("g128", "blocks", "g32_float16_scales", "g32_e8m0_scales")


def cases_of(format, names=None):
    """The cases of one number format, by name: those of some variants, or of all for None."""
    variants = dict(VARIANTS)
    if format.group_size is None:
        variants |= GROUPED
    if format.rounds:
        variants |= {name: {**v, "symmetric": False} for name, v in ASYMMETRIC.items()}
        variants["value_range"] = {"value_range": (-1, 1)}
    if format.codebook is not None:
        variants = {name: v for name, v in variants.items() if name not in GROUPED_BY_INT4}
    return {
        f"{format}-{name}": along(**{"format": format, "axis": 1, **variants[name]})
        for name in names or variants
    }


CASES = {n: c for f in FORMATS.values() for n, c in cases_of(f, VARIANTS_OF.get(f)).items()}
CASES |= {
    "int8-value_range": along(1, value_range=(-100, 90)),
    "int8-asym_value_range": along(1, value_range=(3, 100), symmetric=False),
}
PRESETS = {n: Case(s.weights, 1) for n, s in SCHEMES.items()}
CASES |= {n: case for n, case in PRESETS.items() if case not in CASES.values()}

# One of each kind, for checks that compile each case again.
FEW = {
    name: CASES[name]
    for name in (
        "int8-row",
        "int8-asym_tensor",
        "int4-percentile",
        "int4-asym_min_mse",
        "int4-asym_nested_scales",
        "int2-asym_blocks",
        "fp8_e5m2-g64",
        "nf4-g32_nested_scales",
        "mxfp4-row",
        "nvfp4-row",
    )
}

# Least signal to noise of Gaussian weights, in dB.
FLOORS = {
    "int8-row": 43.0,
    "int4-g128": 18.4,
    "int4-min_mse": 19.5,
    "int4-asym_g32": 21.7,
    "int2-asym_blocks": 3.9,
    "nf4-g64": 20.5,
    "fp8_e4m3-row": 31.4,
    "fp8_e5m2-row": 25.5,
    "mxfp8-row": 30.2,
    "mxfp4-row": 18.6,
    "nvfp4-row": 20.3,
}


def gaussian(shape=SHAPE, seed=0):
    """Float32 weights; rows differ in size, some lie off zero, and some groups are all zero."""
    random = np.random.default_rng(seed)
    x = random.normal(size=shape)
    rows = x.reshape(-1, shape[-1]) if x.size else x
    rows *= np.exp2(random.integers(-6, 3, (len(rows), 1)) + random.random((len(rows), 1)))
    rows[1::5] += 10 * rows[1::5].std(-1, keepdims=True) if x.size else 0
    rows[2, :] = rows[0, : shape[-1] // 2] = 0
    return rows.reshape(shape).astype(np.float32)
