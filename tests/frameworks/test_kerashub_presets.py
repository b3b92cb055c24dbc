"""Presets of KerasHub, quantized while they are loaded."""

from typing import Any

import jax
import numpy as np
import pytest

import jaxquant as jq

from .kerashub_cases import DECODER, ENCODER, token_inputs

keras = pytest.importorskip("keras", reason="pip install -e '.[frameworks]'")
hub = pytest.importorskip("keras_hub", reason="pip install --no-deps keras-hub")
jk = pytest.importorskip("jaxquant.keras")

pytestmark = pytest.mark.usefixtures("quick_compilation")


def backbone(name, arguments) -> Any:
    keras.utils.set_random_seed(0)
    return getattr(hub.models, f"{name}Backbone")(**arguments)


def gemma():
    return backbone("Gemma", {**DECODER, "head_dim": 16, "num_layers": 3})


def mixtral():
    return backbone("Mixtral", {**DECODER, "num_experts": 4, "top_k": 2})


def bert_classifier():
    return hub.models.BertTextClassifier(backbone=backbone("Bert", ENCODER), num_classes=3)


# The model, the class it is loaded as, and arguments.
PRESETS: dict[str, Any] = {
    "Gemma": (gemma, "GemmaBackbone", {}),
    "Gemma, CausalLM": (gemma, "GemmaCausalLM", {"preprocessor": None}),
    "Gemma, bfloat16": (gemma, "GemmaBackbone", {"dtype": "bfloat16"}),
    # Its experts are lifted.
    "Mixtral": (mixtral, "MixtralBackbone", {}),
    # The head of a task is in a second file.
    "Bert": (bert_classifier, "BertTextClassifier", {"preprocessor": None}),
}


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", PRESETS)
def test_a_loaded_preset_is_the_quantized_model_bit_for_bit(name, tmp_path):
    make, kind, arguments = PRESETS[name]
    make().save_to_preset(tmp_path / "preset")
    cls = getattr(hub.models, kind)
    keras.utils.clear_session()  # The names of layers count from 0 again.
    given = cls.from_preset(str(tmp_path / "preset"), **arguments)
    wanted, expected = jk.quantize(given, jq.W4A16_ASYM)
    keras.utils.clear_session()
    found, report = jk.load_preset(cls, tmp_path / "preset", jq.W4A16_ASYM, **arguments)
    assert isinstance(found, type(given))
    assert report.rows == expected.rows
    inputs = token_inputs("Bert" if "Bert" in kind else "Gemma")
    outputs = found(inputs)
    for one, other in zip(jax.tree.leaves(outputs), jax.tree.leaves(wanted(inputs)), strict=True):
        np.testing.assert_array_equal(one, other)
    found.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    for one, other in zip(jax.tree.leaves(outputs), jax.tree.leaves(loaded(inputs)), strict=True):
        np.testing.assert_array_equal(one, other)


def live_bytes():
    return sum(x.nbytes for x in jax.live_arrays())


def test_the_floats_of_one_layer_are_in_memory(tmp_path):
    model = gemma()
    sizes = [v.value.nbytes for v in model.variables]
    model.save_to_preset(tmp_path)
    seen, before = [], live_bytes()

    def progress(done, total, path):
        seen.append((done, total, path, live_bytes() - before))

    _, report = jk.load_preset(hub.models.GemmaBackbone, tmp_path, jq.W8A8, progress=progress)
    paths = [row.path for row in report.rows if row.scheme is not None]
    assert [x[:2] for x in seen] == [(n, len(paths)) for n in range(1, len(paths) + 1)]
    assert {x[2] for x in seen} == set(paths)
    assert max(x[3] for x in seen) < sum(sizes) / 4 + 2 * max(sizes) < 0.6 * sum(sizes)


def test_a_task_generates_and_keeps_what_it_is_told(tmp_path):
    gemma().save_to_preset(tmp_path)
    cls, arguments = hub.models.GemmaCausalLM, {"preprocessor": None}
    rules = {"*ffw*": jq.W8A8, "*": None}
    task, report = jk.load_preset(cls, tmp_path, rules, keep=["decoder_block_0"], **arguments)
    quantized = {row.path.split("/")[0] for row in report.rows if row.scheme is not None}
    assert quantized == {"decoder_block_1", "decoder_block_2"}
    prompt = token_inputs("Gemma")
    prompt["padding_mask"] = np.asarray(np.arange(prompt["token_ids"].shape[1]) < 3)[None].repeat(
        len(prompt["token_ids"]), 0
    )
    assert task.compiled
    found = task.generate(prompt, stop_token_ids=None)["token_ids"]
    assert found.shape == prompt["token_ids"].shape
    bare, _ = jk.load_preset(cls, tmp_path, jq.W8A8, compile=False, **arguments)
    assert not bare.compiled


def test_a_head_with_other_classes_is_new(tmp_path):
    bert_classifier().save_to_preset(tmp_path)
    cls, arguments = hub.models.BertTextClassifier, {"preprocessor": None, "num_classes": 5}
    found, report = jk.load_preset(cls, tmp_path, jq.W8A16, **arguments)
    rows = {row.path: row.scheme for row in report.rows}
    assert rows["logits/kernel"] == "int8 per channel"
    outputs = np.asarray(found(token_inputs("Bert")))
    assert outputs.shape[1:] == (5,)
    assert np.all(np.isfinite(outputs))
    assert np.ptp(outputs) > 0


@pytest.mark.parametrize("files", [[], ["config.json"], ["model.weights.h5"]])
def test_what_is_not_a_preset(files, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    words = "preset must be a folder with config.json and model.weights.h5 or model.weights.json"
    with pytest.raises(ValueError, match=words):
        jk.load_preset(hub.models.GemmaBackbone, tmp_path, jq.W8A8)


def test_what_is_not_a_class_of_kerashub(tmp_path):
    with pytest.raises(ValueError, match=r"cls must be a class of KerasHub .*; got <class 'keras"):
        jk.load_preset(keras.Model, tmp_path, jq.W8A8)


def test_rules_of_a_preset_are_without_methods(tmp_path):
    rules = [jq.Rule("*ffw*", jq.W4A16, method=jq.methods.GPTQ())]
    with pytest.raises(ValueError, match=r"must be without methods, .*; got some in \['\*ffw"):
        jk.load_preset(hub.models.GemmaBackbone, tmp_path, rules)


def test_all_layers_that_cannot_be_quantized_are_listed(tmp_path):
    model = gemma()
    damaged = [model.layers[i].ffw_linear for i in (-2, -3)]
    for layer in damaged:
        layer.kernel.assign(np.full(layer.kernel.shape, np.nan))
    model.save_to_preset(tmp_path)
    words = "fix these 2 problems:.*ffw_linear.* holds NaN.*ffw_linear.* holds NaN"
    with pytest.raises(ValueError, match=f"(?s){words}"):
        jk.load_preset(hub.models.GemmaBackbone, tmp_path, jq.W8A8)
