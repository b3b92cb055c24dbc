import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxquant import (
    FP8_E4M3,
    INT4,
    INT8,
    MXFP4,
    NF4,
    NVFP4,
    SCHEMES,
    AbsMax,
    ArrayConfig,
    MinMSE,
    Percentile,
    Scheme,
)
from jaxquant.core import config as config_module

CONFIG_ERRORS = [
    ({"format": "int8"}, r"format must be a Format such as jaxquant\.INT8; got 'int8'"),
    ({"group_size": 0}, r"group_size must be a positive int.*got 0\."),
    ({"group_size": -32}, r"group_size must be a positive int.*got -32"),
    ({"group_size": 32.0}, r"group_size must be a positive int.*got 32\.0"),
    ({"group_size": (16, 0)}, r"group_size must be.*got \(16, 0\)"),
    ({"per_tensor": 1}, "per_tensor must be True or False; got 1"),
    ({"symmetric": "no"}, "symmetric must be True or False; got 'no'. Write symmetric=True or"),
    (
        {"per_tensor": True, "group_size": 32},
        r"per_tensor=True means one scale for the whole array; got groups of 32 \(format int8\)",
    ),
    (
        {"per_tensor": True, "format": NVFP4},
        r"got groups of 16 \(format nvfp4\)\. Pass per_tensor=False, or leave group_size None",
    ),
    (
        {"format": MXFP4, "group_size": 64},
        r"has a fixed group size of 32; got group_size=64\. Leave",
    ),
    ({"format": NF4, "symmetric": False}, r"needs a format with integer codes.*got format=nf4"),
    ({"format": FP8_E4M3, "symmetric": False}, r"got format=fp8_e4m3, .*Leave symmetric=True"),
    (
        {"range": "abs_max"},
        r"range must be AbsMax\(\), Percentile\(p\) or MinMSE\(\); got 'abs_max",
    ),
    ({"scale_dtype": "int8"}, r"scale_dtype must be .* float64, .*None for.*got 'int8'"),
    ({"scale_dtype": "float8_e5m2"}, r"scale_dtype must be the name of .*got 'float8_e5m2'"),
    (
        {"format": NF4, "value_range": (-1, 1)},
        r"value_range needs a format with int.*format=nf4",
    ),
    ({"value_range": (-200, 100)}, r"within \[-128, 127\] for int8; got \(-200, 100\)"),
    ({"value_range": (-100, 128)}, r"within \[-128, 127\] for int8; got \(-100, 128\)"),
    ({"format": INT4, "value_range": (-9, 7)}, r"within \[-8, 7\] for int4; got \(-9, 7\)"),
    ({"value_range": (5, -5)}, r"two ascending ints.*got \(5, -5\)"),
    ({"value_range": (5, 5)}, r"two ascending ints.*got \(5, 5\)"),
    ({"value_range": [-5, 5]}, r"a tuple of two ascending ints.*got \[-5, 5\]"),
    ({"value_range": 5}, "a tuple of two ascending ints.*got 5"),
    ({"range": MinMSE}, r"range must be AbsMax\(\), .* got <class"),
    ({"group_size": True}, "group_size must be a positive int.*got True"),
    ({"scale_dtype": jnp.dtype("float32")}, "scale_dtype must be the name of.*got dtype"),
    ({"value_range": (-1.5, 5)}, r"two ascending ints.*got \(-1\.5, 5\)"),
    (
        {"value_range": (0, 100)},
        r"needs qmin < 0 < qmax; got 0 to 100\. Widen the range, or pass symm",
    ),
    ({"value_range": (-100, 0)}, "needs qmin < 0 < qmax; got -100 to 0"),
]


@pytest.mark.parametrize("fields, message", CONFIG_ERRORS, ids=lambda v: str(v)[:40])
def test_a_config_is_checked_on_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        ArrayConfig(**fields)


def test_valid_configs_are_accepted():
    assert ArrayConfig(value_range=(-128, 127)).bounds == (-128, 127)
    assert ArrayConfig(value_range=(0, 127), symmetric=False).bounds == (0, 127)
    assert ArrayConfig(format=MXFP4, group_size=32).group_size == 32
    assert ArrayConfig(group_size=(None, 4)).group_size == (None, 4)


def test_bounds_and_scales_are_those_of_the_format_unless_the_config_names_others():
    assert ArrayConfig().bounds == (-127, 127)
    assert ArrayConfig().stored_scale_dtype == "float32"
    assert ArrayConfig(format=MXFP4).stored_scale_dtype == "float8_e8m0fnu"
    assert ArrayConfig(format=MXFP4, scale_dtype="bfloat16").stored_scale_dtype == "bfloat16"


def test_a_scheme_is_checked_on_construction():
    with pytest.raises(ValueError, match=r"got int8\. For a format"):
        Scheme(INT8)  # pyright: ignore[reportArgumentType] (the mistake under test)
    with pytest.raises(ValueError, match="inputs must be an ArrayConfig or None; got 8"):
        Scheme(ArrayConfig(), 8)  # pyright: ignore[reportArgumentType] (the mistake under test)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_preset_is_what_its_name_says(name):
    scheme = SCHEMES[name]
    assert scheme is getattr(config_module, name)
    if name[0] == "W":
        weight_bits, input_bits = name[1:].split("_")[0].split("A")
        assert scheme.weights.format.bits == int(weight_bits)
        bits = 16 if scheme.inputs is None else scheme.inputs.format.bits
        assert bits == int(input_bits)
        assert scheme.weights.symmetric == (not name.endswith("ASYM"))
    else:
        assert (scheme.inputs is None) == name.endswith("A16")
        assert scheme.inputs is None or scheme.inputs.format == scheme.weights.format


OTHERS = {
    "format": INT4,
    "per_tensor": True,
    "group_size": 2,
    "symmetric": False,
    "range": MinMSE(),
    "value_range": (-9, 9),
    "scale_dtype": "bfloat16",
}


def test_configs_compare_by_value_in_every_field():
    assert set(OTHERS) == {f.name for f in dataclasses.fields(ArrayConfig)}
    for field, value in OTHERS.items():
        config = ArrayConfig(**{field: value})
        assert config != ArrayConfig(), field
        assert config == ArrayConfig(**{field: value})
        assert hash(config) == hash(ArrayConfig(**{field: value}))


@pytest.mark.parametrize("value", [ArrayConfig(), Scheme(ArrayConfig(), None), INT8], ids=repr)
def test_configs_schemes_and_formats_are_pytrees_without_leaves(value):
    assert jax.tree.leaves(value) == []
    assert jax.tree.unflatten(jax.tree.structure(value), []) == value
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)


def test_defaults_are_symmetric_int8_by_abs_max():
    assert ArrayConfig() == ArrayConfig(
        format=INT8, symmetric=True, range=AbsMax(), group_size=None
    )
    assert Percentile() == Percentile(99.9)
