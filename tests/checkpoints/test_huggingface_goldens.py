"""Weights equal those that the reference libraries decode, bit for bit."""

import numpy as np
import pytest

from jaxquant.checkpoints import open_folder

from .folders import golden_cases, values_of, write_folder

FAMILIES = ["compressed_tensors", "float8", "gpt_oss", "bitsandbytes", "mlx"]
CASES = [(family, *case) for family in FAMILIES for case in golden_cases(family)]
each_case = pytest.mark.parametrize(
    "family, case, config, tensors, expected", CASES, ids=[f"{c[0]}: {c[1]}" for c in CASES]
)


@pytest.mark.some_rows(2)
@each_case
def test_weights_equal_the_reference(family, case, config, tensors, expected, tmp_path):
    checkpoint = open_folder(write_folder(tmp_path / "model", config, tensors))
    for name, wanted in expected.items():
        stored = checkpoint[name]
        got = values_of(checkpoint, name, wanted.dtype)
        assert stored.shape == wanted.shape
        if stored.is_exact or wanted.dtype.itemsize == 2:
            np.testing.assert_array_equal(got, wanted, strict=True)
        else:
            np.testing.assert_allclose(got, wanted, rtol=1.2e-7, atol=0)
    plain = {n for n, s in checkpoint.items() if s.kind in ("float32", "float16", "bfloat16")}
    for name in plain & set(tensors):
        np.testing.assert_array_equal(values_of(checkpoint, name), tensors[name])
    assert set(checkpoint) == set(expected) | plain
    assert sum(s.nbytes for s in checkpoint.values()) == sum(x.nbytes for x in tensors.values())
