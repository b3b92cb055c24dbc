"""GGUF files rewritten: byte for byte from what was read, and with quantized weights."""

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import (
    INT2,
    INT4,
    INT8,
    MXFP4,
    NF4,
    NVFP4,
    ArrayConfig,
    Inputs,
    checkpoints,
    quantize,
)
from jaxquant.checkpoints import open_gguf, write_gguf
from jaxquant.checkpoints.gguf.block_table import BLOCK_TYPES
from jaxquant.core import IQ4_NL

from .ggml import NAMES
from .gguf_files import ARRAY, STRING, UINT16, UINT32, gguf, golden
from .gguf_files import array as float_tensor
from .gguf_files import blocks as golden_tensor

WRITTEN = [t.name for t in BLOCK_TYPES.values() if t.format is not None and t.is_written]
HALF_32 = {"group_size": 32, "scale_dtype": "float16"}


def write(tmp_path, data, name="template.gguf"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def canonical(name):
    """Golden blocks without bits that decoding ignores."""
    _, blocks, _ = golden(name)
    blocks = blocks.copy()
    if name == "NVFP4":
        blocks[:, :4] &= 0x7F
        blocks[:, :4][blocks[:, :4] == 0x7F] = 0
    if name == "TQ1_0":
        # Bytes are ceil(value * 256 / 243) of five digits; of the last four bytes, four.
        value = np.minimum(blocks[:, :52].astype(int), 242)
        value[:, 48:] -= value[:, 48:] % 3
        blocks[:, :52] = -(-value * 256 // 243)
    return blocks


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("place", [lambda value: value, checkpoints.put], ids=["sources", "arrays"])
def test_blocks_are_written_as_they_were_read(tmp_path, name, place):
    (_, shape, number, _), _ = golden_tensor("w", name)
    data = gguf([], [("w", shape, number, canonical(name).tobytes())])
    template = write(tmp_path, data)
    value = place(open_gguf(template)["w"].value)
    write_gguf(tmp_path / "new.gguf", template, {"w": value})
    assert (tmp_path / "new.gguf").read_bytes() == data


def test_whole_files_are_written_byte_for_byte(tmp_path):
    pairs = [
        ("general.architecture", STRING, "llama"),
        ("tokens", ARRAY, (STRING, ["a", "bc"])),
        ("general.alignment", UINT32, 64),
    ]
    tensors = [float_tensor("x", [1, 2, 3]), float_tensor("scalar", 1.5)]
    for name in (t.name for t in BLOCK_TYPES.values() if t.format is not None):
        raw = canonical(name).tobytes()
        (_, shape, number, _), _ = golden_tensor(name, name)
        tensors += [(name, shape, number, raw)]
    half = np.ones((3, 5), np.float16)
    tensors += [("half", half.shape, 1, half.tobytes())]
    for version in (2, 3):
        data = gguf(pairs, tensors, version, alignment=64)
        for ending in (data, data[: len(data) - (-half.nbytes % 64)]):
            template = write(tmp_path, ending)
            ck = open_gguf(template)
            everything = {n: s.value for n, s in ck.items() if s.kind in WRITTEN or n == "x"}
            for given in ({}, everything):
                write_gguf(tmp_path / "new.gguf", template, given)
                assert (tmp_path / "new.gguf").read_bytes() == ending


CONFIGS = {
    "Q4_0": ArrayConfig(format=INT4, **HALF_32),
    "Q8_0": ArrayConfig(format=INT8, **HALF_32),
    "MXFP4": ArrayConfig(format=MXFP4),
    "Q2_0": ArrayConfig(format=INT2, group_size=64, scale_dtype="float16"),
    "TQ2_0": ArrayConfig(format=INT2, group_size=256, scale_dtype="float16"),
}


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("is_kernel", [False, True], ids=["weight", "kernel"])
def test_quantized_weights_replace_float_ones(tmp_path, kind, is_kernel):
    w = normal(6, 256)
    others = [float_tensor("before", normal(5)), float_tensor("after", normal(7))]
    data = gguf([("a", UINT32, 1)], [others[0], float_tensor("w", w), others[1]])
    template = write(tmp_path, data)
    if is_kernel:
        q = quantize(jnp.asarray(w.T), CONFIGS[kind], axis=0).reorder((-1, -2))
    else:
        q = quantize(jnp.asarray(w), CONFIGS[kind], axis=1)
    write_gguf(tmp_path / "new.gguf", template, {"w": q})
    ck: Any = open_gguf(tmp_path / "new.gguf")
    assert [s.kind for s in ck.values()] == ["F32", kind, "F32"]
    wanted = q.dequantize().T if is_kernel else q.dequantize()
    np.testing.assert_array_equal(checkpoints.put(ck["w"].value).dequantize(), wanted)
    for name, shape, _, content in others:
        assert ck[name].value.read().tobytes() == content
        assert ck[name].shape == shape
    assert ck.metadata == {"a": 1}


def test_scales_in_float32_are_written_if_float16_has_them(tmp_path):
    template = write(tmp_path, gguf([], [float_tensor("w", normal(2, 32))]))
    q = quantize(jnp.asarray(normal(2, 32)), ArrayConfig(format=INT8, **HALF_32), axis=1)
    q = dataclasses.replace(q, scale=q.scale.astype(jnp.float32))
    write_gguf(tmp_path / "new.gguf", template, {"w": q})
    read = checkpoints.put(open_gguf(tmp_path / "new.gguf")["w"].value)
    np.testing.assert_array_equal(read.dequantize(), q.dequantize())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16, np.int32], ids=str)
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_arrays_are_written_in_their_dtype(tmp_path, dtype, convert):
    template = write(tmp_path, gguf([], [golden_tensor("w", "Q4_0")[0], float_tensor("x", [1])]))
    array = (10 * normal(2, 256)).astype(dtype)
    write_gguf(tmp_path / "new.gguf", template, {"w": convert(array)})
    ck: Any = open_gguf(tmp_path / "new.gguf")
    assert ck["w"].value.dtype == array.dtype
    assert ck["w"].value.read().tobytes() == array.tobytes()
    assert ck["x"].value.read().tolist() == [1]


def test_names_of_hugging_face_are_written_as_gguf_needs_them(tmp_path):
    tensors = [golden_tensor("blk.0.attn_q.weight", "Q4_K", rows=4)[0]]
    tensors += [float_tensor("blk.0.attn_q.bias", normal(4))]
    # With 6 pairs, the permutation is not its own inverse.
    tensors += [float_tensor("blk.0.attn_k.weight", normal(12, 3))]
    tensors += [float_tensor("output_norm.weight", [0.75, 1, 2.5])]
    for architecture in ("llama", "gemma"):
        pairs = [("general.architecture", STRING, architecture)]
        pairs += [(f"{architecture}.attention.head_count", UINT32, 1)]
        data = gguf(pairs, tensors)
        template = write(tmp_path, data)
        ck = open_gguf(template, "huggingface")
        values = {name: stored.value for name, stored in ck.items()}
        write_gguf(tmp_path / "new.gguf", template, values, "huggingface")
        assert (tmp_path / "new.gguf").read_bytes() == data


def with_factor(factor=3.0):
    (_, shape, number, _), _ = golden_tensor("w", "NVFP4")
    tensor = ("w.weight", shape, number, canonical("NVFP4").tobytes())
    return gguf([], [tensor, float_tensor("w.scale", [factor])])


def test_factors_of_scales_are_written_where_the_template_has_them(tmp_path):
    template = write(tmp_path, with_factor())
    value = open_gguf(template)["w.weight"].value
    write_gguf(tmp_path / "new.gguf", template, {"w.weight": value})
    assert (tmp_path / "new.gguf").read_bytes() == with_factor()
    q = quantize(jnp.asarray(normal(*value.shape)), ArrayConfig(format=NVFP4), axis=1)
    for replaced in (q, np.asarray(q.dequantize())):
        write_gguf(tmp_path / "new.gguf", template, {"w.weight": replaced})
        names = [t.name for t in BLOCK_TYPES.values()]
        ck: Any = open_gguf(tmp_path / "new.gguf")
        assert ck["w.weight"].kind in names
        read = checkpoints.put(ck["w.weight"].value)
        read = read.dequantize() if hasattr(read, "dequantize") else read
        np.testing.assert_array_equal(read, q.dequantize())
        # Programs multiply the weight by its factor, whatever its type.
        assert "w.scale" not in ck or ck["w.scale"].value.read().tolist() == [1]


def expect_error(tmp_path, value, text, template=None, name="w", names="stored"):
    template = template or write(tmp_path, gguf([], [float_tensor("w", normal(2, 256))]))
    new = tmp_path / "new.gguf"
    with pytest.raises(ValueError, match=text):
        write_gguf(new, template, {name: value}, names)
    assert not new.exists()
    assert [p.name for p in pathlib.Path(tmp_path).glob(".*")] == []


def quantized(axis=1, shape=(2, 256), **config) -> Any:
    return quantize(jnp.asarray(normal(*shape)), ArrayConfig(**config), axis=axis)


@pytest.mark.slow
def test_what_gguf_cannot_hold_is_an_error(tmp_path):
    asymmetric = quantized(format=INT4, symmetric=False, **HALF_32)
    expect_error(tmp_path, asymmetric, "'w' has a zero point.*Q4_1 cannot hold.*symmetric scheme")
    q = quantized(format=INT4, **HALF_32)
    moved = dataclasses.replace(q, inputs=Inputs(multiplier=jnp.ones(256)))
    expect_error(tmp_path, moved, "a multiplier, a permutation or a rotation")
    expect_error(
        tmp_path, quantized(format=INT4, group_size=128), "'w' fits no type of GGUF; got QTensor"
    )
    expect_error(
        tmp_path, quantized(format=NF4, **HALF_32), "group_size=32 and scale_dtype='float16'"
    )
    expect_error(
        tmp_path, quantized(format=INT4, shape=(256, 2), axis=0, **HALF_32), "fits no type"
    )
    expect_error(
        tmp_path, quantized(format=INT4, shape=(4, 256), **HALF_32), r"for shape \(2, 256\)"
    )
    expect_error(
        tmp_path, quantized(format=INT4, group_size=32), "scales in float16.* float32 values"
    )
    template = write(tmp_path, gguf([], [golden_tensor("w", "Q2_K")[0]]), "q2.gguf")
    q2: Any = open_gguf(template)["w"].value
    other = dataclasses.replace(q2, scale=dataclasses.replace(q2.scale, format=IQ4_NL))
    expect_error(tmp_path, other, "fits no type", template)
    wide = dataclasses.replace(q, scale=q.scale.astype(jnp.float32) * 1e6)
    expect_error(tmp_path, wide, "which does not have all of the float32 values. Quantize with")


@pytest.mark.parametrize("name", [n for n in NAMES.values() if n not in WRITTEN])
def test_types_of_grids_are_only_read(tmp_path, name):
    template = write(tmp_path, gguf([], [golden_tensor("w", name)[0]]))
    value = open_gguf(template)["w"].value
    expect_error(tmp_path, value, "fits no type of GGUF.*IQ1, IQ2 and IQ3 are only read", template)


def test_codes_that_blocks_cannot_hold_are_an_error(tmp_path):
    (_, shape, number, raw), _ = golden_tensor("w", "TQ1_0")
    template = write(tmp_path, gguf([], [("w", shape, number, raw)]))
    q = quantized(format=INT2, group_size=256, scale_dtype="float16", shape=shape)
    q = dataclasses.replace(q, codes=jnp.full(shape, -2, jnp.int2))
    expect_error(
        tmp_path, q, "'w': blocks of TQ1_0 cannot hold all of its int2 values; got", template
    )


def test_arrays_and_names_that_do_not_fit_are_errors(tmp_path):
    expect_error(
        tmp_path, normal(2, 255), r"'w' must be an array of shape \(2, 256\).*got float32 of"
    )
    expect_error(tmp_path, np.ones((2, 256), bool), "one of the dtypes float32, .*got bool")
    expect_error(tmp_path, normal(2, 256), "has no tensor 'v'; it has w, ...", name="v")
    expect_error(tmp_path, normal(2, 256), "names must be one of", names="hf")


def test_norms_that_files_shift_are_arrays(tmp_path):
    pairs = [("general.architecture", STRING, "gemma")]
    template = write(tmp_path, gguf(pairs, [float_tensor("output_norm.weight", normal(64))]))
    q = quantized(format=INT8, shape=(64,), axis=0, **HALF_32)
    text = "'model.norm.weight' must be an array, because the file adds 1 to it; got QTensor"
    expect_error(tmp_path, q, text, template, "model.norm.weight", "huggingface")
    write_gguf(tmp_path / "new.gguf", template, {"output_norm.weight": q})
    read = checkpoints.put(open_gguf(tmp_path / "new.gguf")["output_norm.weight"].value)
    np.testing.assert_array_equal(read.dequantize(), q.dequantize())
    with pytest.raises(
        ValueError, match=r"'output_norm.weight': must be a float type, .* got Q8_0"
    ):
        open_gguf(tmp_path / "new.gguf", "huggingface")


def test_factors_of_another_type_are_an_error(tmp_path):
    tensor, _ = golden_tensor("w.weight", "NVFP4")
    half = ("w.scale", (1,), 1, np.ones(1, np.float16).tobytes())
    template = write(tmp_path, gguf([], [tensor, half]))
    q = quantized(format=NVFP4, shape=tensor[1])
    expect_error(tmp_path, q, "shape of 'w.scale': must be one F32 .*got F16", template, "w.weight")


def test_factors_without_a_tensor_are_errors(tmp_path):
    q = quantized(format=NVFP4)
    template = write(tmp_path, gguf([], [float_tensor("w", normal(2, 256))]))
    expect_error(tmp_path, q, "'w' has 1 factors of its scales, .*template has no tensor", template)
    unit = dataclasses.replace(q, scale=dataclasses.replace(q.scale, scale=jnp.ones((1, 1))))
    write_gguf(tmp_path / "new.gguf", template, {"w": unit})
    assert open_gguf(tmp_path / "new.gguf")["w"].kind == "NVFP4"


def test_scales_of_scales_with_an_offset_are_errors(tmp_path):
    template = write(tmp_path, with_factor())
    q = quantized(format=NVFP4, shape=open_gguf(template)["w.weight"].shape)
    moved = dataclasses.replace(q.scale, offset=jnp.ones((1, 1)))
    text = "'w.weight' fits no type of GGUF"
    expect_error(tmp_path, dataclasses.replace(q, scale=moved), text, template, "w.weight")


def test_shards_are_no_template(tmp_path):
    for i in range(2):
        pairs = [("split.no", UINT16, i), ("split.count", UINT16, 2)]
        write(tmp_path, gguf(pairs, [float_tensor(f"w{i}", [1])]), f"m-0000{i + 1}-of-00002.gguf")
    template = tmp_path / "m-00001-of-00002.gguf"
    expect_error(tmp_path, normal(1), "is one of 2 shards.*llama-gguf-split --merge", template)
