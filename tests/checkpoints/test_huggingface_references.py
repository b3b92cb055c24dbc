"""The cases of the golden files, made and decoded again by the libraries installed here.

And folders that `write_folder` writes, decoded by compressed-tensors.
"""

import json

import numpy as np
import pytest

from jaxquant.checkpoints import open_folder
from jaxquant.checkpoints import write_folder as write_quantized

from .folders import golden_cases, values_of, write_folder
from .references import FAMILIES, PACKAGES, decompressed, write
from .test_huggingface_writer import CONFIG, SCHEMES, quantized

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


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "nvfp4"])
def test_compressed_tensors_reads_what_is_written(scheme, tmp_path):
    pytest.importorskip("compressed_tensors")
    torch = pytest.importorskip("safetensors.torch")
    q = quantized(scheme, (16, 64))
    write_quantized(tmp_path / "model", {"a.weight": q}, CONFIG)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    tensors = torch.load_file(tmp_path / "model" / "model.safetensors")
    got = decompressed(config, tensors, "a").to(torch.torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(got, np.asarray(q.dequantize().astype(np.float32)))
