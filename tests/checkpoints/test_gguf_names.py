"""Tensors of GGUF files as models of Hugging Face have them."""

from typing import Any

import numpy as np
import pytest

from jaxquant.checkpoints import open_gguf

from .gguf_files import ARRAY, STRING, UINT32, gguf, values_of
from .gguf_files import array as float_tensor
from .gguf_files import blocks as golden_tensor

HEADS, KV_HEADS = 4, 2


def permuted(w, heads):
    """What converters to GGUF do with the rows of query and key projections."""
    halves = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:])
    return halves.swapaxes(1, 2).reshape(w.shape)


def llama(architecture="llama", counts=((UINT32, HEADS), (UINT32, KV_HEADS))):
    pairs = [("general.architecture", STRING, architecture)]
    keys = ("head_count", "head_count_kv")
    pairs += [(f"{architecture}.attention.{k}", *c) for k, c in zip(keys, counts, strict=False)]
    return pairs


def weights(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def opened(tmp_path, pairs, tensors, names="huggingface") -> Any:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf(pairs, tensors))
    return open_gguf(path, names)


def test_llama_has_the_names_of_hugging_face(tmp_path):
    parts = {
        "attn_norm": "input_layernorm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
    }
    wanted = {f"blk.11.{k}.weight": f"model.layers.11.{v}.weight" for k, v in parts.items()}
    wanted |= {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "output_norm.weight": "model.norm.weight",
        "rope_freqs.weight": "rope_freqs.weight",
        "blk.0.ffn_gate_exps.weight": "blk.0.ffn_gate_exps.weight",
        "blk.0.attn_q.scale": "blk.0.attn_q.scale",
    }
    tensors = [float_tensor(name, weights(16)) for name in wanted]
    assert list(opened(tmp_path, llama(), tensors)) == list(wanted.values())
    assert list(opened(tmp_path, llama(), tensors, "stored")) == list(wanted)


@pytest.mark.parametrize("architecture", ["llama", "granite", "smollm3"])
def test_rows_of_queries_and_keys_are_in_their_original_order(tmp_path, architecture):
    q, k, v = weights(32, 3), weights(16, 3), weights(16, 2)
    bias = weights(32)
    stored = [
        ("blk.0.attn_q.weight", permuted(q, HEADS)),
        ("blk.0.attn_q.bias", permuted(bias, HEADS)),
        ("blk.0.attn_k.weight", permuted(k, KV_HEADS)),
        ("blk.0.attn_v.weight", v),
    ]
    tensors = [float_tensor(*s) for s in stored]
    ck = opened(tmp_path, llama(architecture), tensors)
    prefix = "model.layers.0.self_attn."
    np.testing.assert_array_equal(values_of(ck[prefix + "q_proj.weight"]), q)
    np.testing.assert_array_equal(values_of(ck[prefix + "q_proj.bias"]), bias)
    np.testing.assert_array_equal(values_of(ck[prefix + "k_proj.weight"]), k)
    np.testing.assert_array_equal(values_of(ck[prefix + "v_proj.weight"]), v)
    assert all(s.is_exact for s in ck.values())
    part = (slice(3, 21), slice(1, 3))
    np.testing.assert_array_equal(ck[prefix + "q_proj.weight"].value.read(part), q[part])
    as_stored = opened(tmp_path, llama(architecture), tensors, "stored")
    np.testing.assert_array_equal(values_of(as_stored["blk.0.attn_q.weight"]), stored[0][1])


@pytest.mark.parametrize("name", ["Q4_K", "Q4_1", "Q8_0"])
def test_rows_of_quantized_queries_are_reordered_without_requantizing(tmp_path, name):
    tensor, values = golden_tensor("blk.0.attn_q.weight", name, rows=4)
    ck = opened(tmp_path, llama(counts=[(UINT32, 1)]), [tensor])
    stored = ck["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(permuted(values_of(stored), 1), values)
    assert not np.array_equal(values_of(stored), values)
    codes = stored.value.codes
    cut = (slice(1, 4), slice(20, 70))
    np.testing.assert_array_equal(codes.read(cut), codes.read()[cut])


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
def test_rows_of_other_architectures_stay(tmp_path, architecture):
    q = weights(32, 3)
    tensors = [float_tensor("blk.0.attn_q.weight", q)]
    ck = opened(tmp_path, llama(architecture), tensors)
    np.testing.assert_array_equal(values_of(ck["model.layers.0.self_attn.q_proj.weight"]), q)


def test_keys_have_the_heads_of_queries_unless_the_file_says_otherwise(tmp_path):
    k = weights(32, 3)
    tensors = [float_tensor("blk.0.attn_k.weight", permuted(k, HEADS))]
    ck = opened(tmp_path, llama(counts=[(UINT32, HEADS)]), tensors)
    np.testing.assert_array_equal(values_of(ck["model.layers.0.self_attn.k_proj.weight"]), k)


def test_heads_may_differ_by_layer(tmp_path):
    q = weights(32, 3)
    tensors = [float_tensor(f"blk.{i}.attn_q.weight", permuted(q, 2 << i)) for i in range(2)]
    ck = opened(tmp_path, llama(counts=[(ARRAY, (UINT32, [2, 4]))]), tensors)
    for i in range(2):
        values = values_of(ck[f"model.layers.{i}.self_attn.q_proj.weight"])
        np.testing.assert_array_equal(values, q)


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "gemma3"])
def test_norms_of_gemma_lose_the_one_that_files_add(tmp_path, architecture):
    norm, other = weights(8), weights(8)
    tensors = [
        float_tensor("blk.0.attn_norm.weight", norm + 1),
        float_tensor("output_norm.weight", norm + 1),
        float_tensor("blk.0.attn_output.weight", other),
    ]
    ck = opened(tmp_path, llama(architecture), tensors)
    for name in ("model.layers.0.input_layernorm.weight", "model.norm.weight"):
        np.testing.assert_array_equal(ck[name].value.read(), norm + np.float32(1) - 1)
        assert ck[name].note == "the file stores norms plus 1, which is subtracted"
        assert ck[name].value.read((slice(2, 5),)).shape == (3,)
    np.testing.assert_array_equal(values_of(ck["model.layers.0.self_attn.o_proj.weight"]), other)
    as_stored = opened(tmp_path, llama(architecture), tensors, "stored")
    np.testing.assert_array_equal(as_stored["output_norm.weight"].value.read(), norm + 1)
    assert as_stored["output_norm.weight"].is_exact


def test_norms_around_layers_and_of_heads_have_names(tmp_path):
    parts = {
        "attn_norm": "input_layernorm",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    tensors = [float_tensor(f"blk.3.{part}.weight", weights(4)) for part in parts]
    ck = opened(tmp_path, llama("gemma3"), tensors)
    assert list(ck) == [f"model.layers.3.{name}.weight" for name in parts.values()]
    assert not any(s.is_exact for s in ck.values())
    assert list(opened(tmp_path, llama("qwen3"), tensors))[1] == (
        "model.layers.3.self_attn.q_norm.weight"
    )


def test_fused_projections_of_phi_have_names(tmp_path):
    tensors = [float_tensor(f"blk.0.{part}.weight", weights(4)) for part in ("attn_qkv", "ffn_up")]
    assert list(opened(tmp_path, llama("phi3"), tensors)) == [
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.mlp.gate_up_proj.weight",
    ]


ONE = [float_tensor("blk.1.attn_q.weight", weights(32, 3))]
NOT_RENAMED = [
    (llama("mamba"), ONE, "general.architecture: 'mamba' has no table .* names='stored'"),
    ([], ONE, "general.architecture: None has no table"),
    (llama(counts=[]), ONE, "llama.attention.head_count: must be a number of heads .* got None"),
    (llama(counts=[(UINT32, 0)]), ONE, "head_count: .*got 0"),
    (llama(counts=[(UINT32, 5)]), ONE, "head_count: .*divides the 32 rows of layer 1's attn_q"),
    (llama(counts=[(UINT32, 32)]), ONE, "head_count: .*into pairs; got 32"),
    (llama(counts=[(STRING, "4")]), ONE, "head_count: .*got '4'"),
    (llama(counts=[(ARRAY, (UINT32, [4]))]), ONE, r"head_count: .*got \[4\]"),
    (
        llama("qwen2"),
        [float_tensor("output.weight", [1]), float_tensor("lm_head.weight", [1])],
        "'lm_head.weight' and another tensor are both 'lm_head.weight'",
    ),
]


@pytest.mark.parametrize("pairs, tensors, text", NOT_RENAMED)
def test_what_cannot_be_renamed_is_an_error(tmp_path, pairs, tensors, text):
    opened(tmp_path, pairs, tensors, "stored")
    with pytest.raises(ValueError, match=text) as caught:
        opened(tmp_path, pairs, tensors)
    assert str(tmp_path / "a.gguf") in str(caught.value)


def test_unknown_kinds_of_names_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="names must be one of 'stored', 'huggingface'; got 'hf'"):
        opened(tmp_path, [], ONE, "hf")


def nvfp4(experts=1):
    tensor, values = golden_tensor("blk.0.ffn_up.weight", "NVFP4")
    name, shape, number, data = tensor
    if experts > 1:
        shape = (experts, shape[0] // experts, shape[1])
    return (name, shape, number, data), values.reshape(shape)


@pytest.mark.parametrize("name", ["blk.0.ffn_up.scale", "blk.0.ffn_up.weight.scale"])
@pytest.mark.parametrize("experts", [1, 2])
def test_the_factor_of_a_tensor_is_part_of_its_scales(tmp_path, name, experts):
    tensor, values = nvfp4(experts)
    factor = np.array([0.5, 3.0][:experts], np.float32)
    for names in ("stored", "huggingface"):
        ck = opened(tmp_path, llama("qwen3"), [tensor, float_tensor(name, factor)], names)
        (stored,) = ck.values()
        assert "the factor of the tensor is rounded" in stored.note
        assert stored.nbytes == len(tensor[3]) + 4 * experts
        wanted = values * (factor.reshape(-1, 1, 1) if experts > 1 else factor)
        np.testing.assert_allclose(values_of(stored), wanted, rtol=2e-7)


def test_factors_of_another_shape_or_type_are_errors(tmp_path):
    tensor, _ = nvfp4()
    name = "blk.0.ffn_up.scale"
    half = (name, (1,), 1, np.ones(1, np.float16).tobytes())
    for factor in (float_tensor(name, [1.0, 2.0]), float_tensor(name, [[1.0], [2.0]]), half):
        with pytest.raises(ValueError, match=r"shape of 'blk.0.ffn_up.scale': must be one F32"):
            opened(tmp_path, [], [tensor, factor], "stored")
