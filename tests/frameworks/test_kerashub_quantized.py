"""Backbones and language models of KerasHub, quantized as Keras models: small, random weights."""

from typing import Any

import numpy as np
import pytest

import jaxquant as jq

from . import checks
from .kerashub_cases import DECODER, ENCODER, token_inputs

keras = pytest.importorskip("keras", reason="pip install -e '.[frameworks]'")
hub = pytest.importorskip("keras_hub", reason="pip install --no-deps keras-hub")
jk = pytest.importorskip("jaxquant.keras")

pytestmark = pytest.mark.usefixtures("quick_compilation")
IMAGES = {
    "image_shape": (16, 16, 3),
    "patch_size": 8,
    "num_layers": 1,
    "num_heads": 4,
    "hidden_dim": 64,
    "mlp_dim": 128,
}
GEMMA3 = {"head_dim": 16, "image_size": 16, "vision_encoder": None}
LINEAR = {
    "layer_types": ["linear_attention"],
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {"num_experts": 4, "top_k": 2}
# By name: the arguments; how many matrices, kernels and tables; what else has rows and columns.
BACKBONES: dict[str, Any] = {
    "Gemma": ({**DECODER, "head_dim": 16}, 8, []),
    "Gemma3": ({**DECODER, **GEMMA3}, 8, []),
    "GPT2": (ENCODER, 7, ["position_embedding/embeddings"]),
    "Bert": (ENCODER, 9, ["position_embedding/embeddings"]),
    "ViT": (IMAGES, 8, ["vit_patching_and_embedding/class_token"]),
    # Its decoder layer has a get_config that raises AttributeError, its backbone does not.
    "Llama": (DECODER, 9, []),
    # A depthwise kernel is kept as a matrix.
    "Qwen3_5": ({**DECODER, **LINEAR}, 11, []),
}


def made(name, **arguments) -> Any:
    keras.utils.set_random_seed(0)
    return getattr(hub.models, f"{name}Backbone")(**BACKBONES[name][0], **arguments)


def inputs_of(name):
    if name == "ViT":
        return np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    return token_inputs(name)


def is_bias(row):
    return row.path.endswith("/bias")


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", BACKBONES)
def test_every_matrix_of_a_backbone_is_quantized(name, tmp_path):
    model, inputs = made(name), inputs_of(name)
    _, count, others = BACKBONES[name]
    wanted = model(inputs)
    quantized, report = jk.quantize(model, jq.W8A8)
    assert isinstance(quantized, type(model))
    assert sum(row.scheme is not None for row in report.rows) == count
    left = [r for r in report.rows if r.scheme is None and len(r.shape) > 1 and not is_bias(r)]
    assert [row.path for row in left] == others
    found = quantized(inputs)
    assert 0 < checks.distance(found, wanted) < 0.04
    assert checks.distance(model(inputs), wanted) == 0

    quantized.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, type(model))
    assert checks.distance(loaded(inputs), found) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_the_function_of_a_backbone_computes_the_same(name):
    model, inputs = made(name), inputs_of(name)
    apply, params = jk.functional(model)
    rules = jq.uses(apply, params, inputs).rules(jq.W8A8)
    quantized = jq.tree.quantize(params, rules)
    replaced, report = jk.quantize(model, jq.W8A8)
    done = {row.path for row in report.rows if row.scheme}
    # That of Llama is for its CausalLM.
    assert done - checks.quantized_paths(quantized) <= {"token_embedding/reverse_embeddings"}
    found = jq.lift(apply, strict=True)(quantized, inputs)
    # Rounding differs: a product of heads may be one of rows of another length.
    assert checks.distance(found, replaced(inputs)) < 0.02


def language_model(name, **arguments) -> Any:
    backbone = made(name, **arguments)
    model = getattr(hub.models, f"{name}CausalLM")(backbone=backbone, preprocessor=None)
    model.compile(sampler="greedy")
    return model


def prompt():
    tokens = np.random.default_rng(0).integers(1, 128, (2, 12))
    mask = np.arange(12) < 5
    return {"token_ids": tokens * mask, "padding_mask": np.broadcast_to(mask, (2, 12)).astype(int)}


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("name", ["Gemma", "GPT2"])
def test_a_language_model_generates_from_codes(name, tmp_path):
    model = language_model(name)
    quantized, _ = jk.quantize(model, jq.W8A16)
    quantized.compile(sampler="greedy")
    held = sum(v.value.nbytes for v in quantized.variables)
    assert held < 0.32 * sum(v.value.nbytes for v in model.variables)
    found = quantized.generate(prompt(), stop_token_ids=None)["token_ids"]
    # Greedy decoding without a cache.
    tokens = prompt()["token_ids"]
    for i in range(5, 12):
        ones = np.ones_like(tokens)
        logits = quantized({"token_ids": tokens, "padding_mask": ones})
        tokens[:, i] = np.argmax(np.asarray(logits)[:, i - 1], -1)
    np.testing.assert_array_equal(found, tokens)
    compiled = quantized.generate_function
    quantized.generate(prompt(), stop_token_ids=None)
    assert quantized.generate_function is compiled

    quantized.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    loaded.compile(sampler="greedy")
    assert type(loaded.backbone).__name__ == f"{name}Backbone"
    again = loaded.generate(prompt(), stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(again, found)


# Backbones whose experts are bare weights: more arguments, and how many weights are quantized.
GEMMA4 = {
    "head_dim": 16,
    "image_size": 16,
    "enable_moe_block": True,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "expert_intermediate_dim": 32,
}
SHARED = {"moe_intermediate_dim": 32, "shared_expert_intermediate_dim": 48}
WITH_EXPERTS = {
    "Mixtral": (EXPERTS, 10),
    "Gemma4": (GEMMA4, 12),
    "QwenMoe": ({**EXPERTS, **SHARED}, 13),
    "GptOss": ({"num_experts": 4, "head_dim": 16}, 9),
    "Qwen3Moe": ({**EXPERTS, "head_dim": 16, "moe_intermediate_dim": 64}, 9),
}


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_experts_are_quantized_by_lifting_their_call(name, tmp_path):
    keras.utils.set_random_seed(0)
    arguments, count = WITH_EXPERTS[name]
    model = getattr(hub.models, f"{name}Backbone")(**DECODER, **arguments)
    inputs = prompt()
    if "position_ids" in model.input:
        inputs["position_ids"] = np.broadcast_to(np.arange(12), (2, 12))
    quantized, report = jk.quantize(model, jq.W8A16)
    done = [row.path for row in report.rows if row.scheme]
    assert len(done) == count
    assert any("/experts/" in path or "expert_bank" in path for path in done)
    # Layers that KerasHub does not name have the paths of the given model.
    assert [row.path for row in report.rows] == [v.path for v in model.weights]
    found = quantized(inputs)
    assert 0 < checks.distance(found, model(inputs)) < 0.03
    apply, params = jk.functional(quantized)
    assert not jq.explain(apply, params, inputs).dequantized

    quantized.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded).__name__ == f"{name}Backbone"
    assert checks.distance(loaded(inputs), found) == 0


BLOOM = {name: value for name, value in ENCODER.items() if name != "max_sequence_length"}
OF_OTHER_FAMILIES = {
    "BartSeq2SeqLM": ENCODER,
    "BloomCausalLM": BLOOM,
    "FalconCausalLM": {
        "num_attention_heads" if k == "num_heads" else k: v for k, v in BLOOM.items()
    },
    "MixtralCausalLM": {**DECODER, **EXPERTS},
    "Phi3CausalLM": DECODER,
    "Qwen3_5CausalLM": BACKBONES["Qwen3_5"][0],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_OTHER_FAMILIES)
def test_other_families_generate_what_their_dequantized_weights_do(name):
    keras.utils.set_random_seed(0)
    cls = getattr(hub.models, name)
    is_encoded = issubclass(cls, hub.models.Seq2SeqLM)
    backbone = cls.backbone_cls(**OF_OTHER_FAMILIES[name])
    model = cls(backbone=backbone, preprocessor=None)
    quantized, _ = jk.quantize(model, jq.W8A16)
    held = sum(v.value.nbytes for v in quantized.variables)
    assert held < 0.35 * sum(v.value.nbytes for v in model.variables)
    inputs = prompt()
    if is_encoded:
        asked = {f"encoder_{key}": value for key, value in prompt().items()}
        inputs = {**asked, **{f"decoder_{key}": value for key, value in inputs.items()}}
    key = "decoder_token_ids" if is_encoded else "token_ids"
    texts = []
    for found in (quantized, jk.to_stock(quantized, dequantize=True)):
        found.compile(sampler="greedy")
        texts.append(np.asarray(found.generate(inputs, stop_token_ids=None)[key]))
    np.testing.assert_array_equal(texts[0][:, :5], prompt()["token_ids"][:, :5])
    np.testing.assert_array_equal(*texts)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [jq.W8A16, jq.W4A16_ASYM], ids=["W8A16", "W4A16"])
def test_lora_of_a_quantized_backbone_trains_and_is_in_files(scheme, tmp_path):
    quantized, _ = jk.quantize(made("Gemma"), scheme)
    before = quantized(prompt())
    quantized.enable_lora(4)
    assert checks.distance(quantized(prompt()), before) == 0
    assert len(quantized.trainable_variables) == 4
    quantized.compile(keras.optimizers.Adam(0.01), "mse")
    targets = np.random.default_rng(0).normal(size=(2, 12, 64))
    losses = quantized.fit(prompt(), targets, epochs=4, verbose=0).history["loss"]
    assert losses == sorted(losses, reverse=True)
    found = quantized(prompt())
    assert checks.distance(found, before) > 0.03

    quantized.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    assert checks.distance(loaded(prompt()), found) == 0
    quantized.save_lora_weights(tmp_path / "adapter.lora.h5")
    other, _ = jk.quantize(made("Gemma"), scheme)
    other.load_lora_weights(tmp_path / "adapter.lora.h5")
    assert checks.distance(other(prompt()), found) == 0


def test_a_backbone_in_bfloat16_keeps_its_dtype(tmp_path):
    model = made("Gemma", dtype="bfloat16")
    quantized, _ = jk.quantize(model, jq.W8A16)
    quantized.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for found in (quantized, loaded):
        norm = found.get_layer("final_normalization")
        assert (norm.dtype_policy.name, norm.scale.dtype) == ("bfloat16", "bfloat16")
        table = found.get_layer("token_embedding")
        assert table.dtype_policy.name == "int8_from_bfloat16"


@pytest.mark.slow
def test_to_stock_gives_the_class_of_keras_hub():
    model = language_model("GPT2")
    quantized, _ = jk.quantize(model, "int8")
    stock = jk.to_stock(quantized, dequantize=True)
    assert type(stock) is type(model)
    assert type(stock.backbone) is type(model.backbone)
    assert not [x for x in stock._flatten_layers() if "jaxquant" in type(x).__module__]
    assert checks.distance(stock(prompt()), quantized(prompt())) < 0.02
