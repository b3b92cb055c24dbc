import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest

from jaxquant import (
    FORMATS,
    INT4,
    NVFP4,
    ArrayConfig,
    Format,
    Inputs,
    MinMSE,
    Percentile,
    QTensor,
    quantize,
)
from jaxquant.core import (
    config_from_json,
    config_to_json,
    static_from_json,
    static_to_json,
)

from .. import cases, checks


def through_json(value):
    return json.loads(json.dumps(value))


def test_ranges_keep_their_attributes():
    config = ArrayConfig(format=INT4, range=MinMSE(mirrored=True))
    assert config_from_json(through_json(config_to_json(config))) == config


def test_a_range_of_before_it_had_attributes_is_read():
    fields = config_to_json(ArrayConfig(range=MinMSE()))
    fields["range"] = {"name": "MinMSE"}
    assert config_from_json(fields) == ArrayConfig(range=MinMSE())


@pytest.mark.parametrize("name", cases.CASES)
def test_every_config_comes_back_equal_from_json(name):
    config = cases.CASES[name].config
    assert config_from_json(through_json(config_to_json(config))) == config


def test_a_config_with_a_format_of_a_user_comes_back_without_its_row():
    format = Format("ternary", "uint2", -1.0, 1.0, codebook=(-1.0, 0.0, 1.0), group_size=8)
    config = ArrayConfig(format=format, range=Percentile(97.5))
    assert config_from_json(through_json(config_to_json(config))) == config


@dataclasses.dataclass(frozen=True)
class Mine:
    def __call__(self, groups, axes, symmetric, error):
        raise NotImplementedError


def test_a_range_without_a_row_cannot_be_written():
    message = r"ranges AbsMax, Percentile, MinMSE can be saved; got Mine\(\)\. Add its class to"
    with pytest.raises(ValueError, match=message):
        config_to_json(ArrayConfig(range=Mine()))


@pytest.mark.parametrize("order", [None, (-1, -2)], ids=str)
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_static_fields_come_back_equal_from_json(format, order):
    for dtype in ("float32", "bfloat16"):
        x, config = jax.ShapeDtypeStruct((32, 32), dtype), ArrayConfig(format=format)
        q = jax.eval_shape(lambda x, c=config: quantize(x, c).reorder(order), x)
        static = static_from_json(through_json(static_to_json(q)))
        again = QTensor(q.codes, q.scale, q.zero_point, **static)
        assert jax.tree.structure(again) == jax.tree.structure(q)


EXPORTED = [
    (cases.along(0, format=INT4, group_size=4, symmetric=False), None, None),
    (cases.along(0, format=INT4, group_size=4, symmetric=False), (-1, -2), Inputs()),
    (cases.along(1, format=NVFP4), (-1, -2), Inputs(ArrayConfig())),
]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("case, order, inputs", EXPORTED, ids=str)
def test_functions_of_qtensors_survive_export(case, order, inputs):
    x = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    q = dataclasses.replace(quantize(x, *case).reorder(order), inputs=inputs)

    @jax.jit
    def f(q, y):
        return q.astype("bfloat16"), q.dequantize() + y

    exported = jax.export.export(f)(q, x)
    again = jax.export.deserialize(exported.serialize())

    assert again.in_tree == jax.tree.structure(((q, x), {}))
    for got, wanted in zip(again.call(q, x), f(q, x), strict=True):
        checks.assert_equal_quantized(got, wanted)


def test_functions_of_configs_survive_export():
    config = ArrayConfig(range=Percentile(99.5), value_range=(-100, 100))
    x = cases.gaussian()
    exported = jax.export.export(jax.jit(partial(quantize, axis=1)))(x, config)
    again = jax.export.deserialize(exported.serialize())
    checks.assert_equal_quantized(again.call(x, config), quantize(x, config, axis=1))


# As written before `axis` became an argument of the functions that quantize.
OLD = {
    "format": {
        "name": "int8",
        "dtype": "int8",
        "qmin": -127,
        "qmax": 127,
        "codebook": None,
        "group_size": None,
        "scale_dtype": "float32",
        "power": None,
    },
    "axis": -1,
    "group_size": None,
    "symmetric": True,
    "range": {"name": "Percentile", "p": 99.0},
    "value_range": [-100, 100],
    "scale_dtype": None,
}


@pytest.mark.parametrize(
    "axis, fields, expected",
    [
        (-1, {}, {}),
        ([0, 1], {"group_size": [4, 8]}, {"group_size": (4, 8)}),
        (None, {}, {"per_tensor": True}),
    ],
    ids=str,
)
def test_configs_that_were_written_with_an_axis_can_be_read(axis, fields, expected):
    config = ArrayConfig(range=Percentile(99.0), value_range=(-100, 100), **expected)
    assert config_from_json(through_json({**OLD, "axis": axis, **fields})) == config


def test_groups_along_all_axes_that_were_written_are_not_read_as_others():
    with pytest.raises(ValueError, match=r"per_tensor=True means one scale .* groups of 4"):
        config_from_json(through_json({**OLD, "axis": None, "group_size": 4}))
