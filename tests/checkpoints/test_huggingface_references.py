"""The cases of the golden files, made and decoded again by the libraries installed here."""

import numpy as np
import pytest

from jaxquant.checkpoints import open_folder

from .folders import golden_cases, values_of, write_folder
from .references import FAMILIES, PACKAGES, write

pytest.importorskip("torch", reason="needs the packages of jaxquant[checkpoints-check]")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_equal_the_reference(family, tmp_path):
    pytest.importorskip(PACKAGES[family])
    path = write(family, tmp_path)
    for case, config, tensors, expected in golden_cases(family, path.parent):
        checkpoint = open_folder(write_folder(tmp_path / "model", config, tensors))
        for name, wanted in expected.items():
            got = values_of(checkpoint, name, wanted.dtype)
            is_exact = checkpoint[name].is_exact or wanted.dtype.itemsize == 2
            tolerance = 0 if is_exact else 1.2e-7
            np.testing.assert_allclose(
                got.astype(np.float32), wanted.astype(np.float32), tolerance, 0, err_msg=case
            )
