"""Files of adapters: what PEFT computes from them is what the tree stands for."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxquant as jq
from jaxquant import INT4, ArrayConfig, Rule
from jaxquant.training import load_peft, lora_init, save_peft

KEY = jax.random.key(0)
CONFIG = ArrayConfig(format=INT4, group_size=16)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def trained(x, seed=7):
    """Adapters that are not zero."""
    a, b = normal(*x.a.shape, seed=seed), normal(*x.b.shape, seed=seed + 1)
    x = dataclasses.replace(x, a=a.astype(x.a.dtype), b=b.astype(x.b.dtype))
    if x.magnitude is None:
        return x
    return dataclasses.replace(x, magnitude=x.magnitude * 1.5)


def weight_by_peft(folder, name, base):
    """What PEFT makes of the weight (outputs, inputs) of a linear layer, after its formulas."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    prefix = f"base_model.model.{name}"
    a, b = (tensors[f"{prefix}.lora_{x}.weight"].astype(np.float64) for x in "AB")

    def of_layer(pattern, default):
        found = (v for k, v in config[pattern].items() if re.match(rf"(.*\.)?({k})$", name))
        return next(found, config[default])

    rank, alpha = of_layer("rank_pattern", "r"), of_layer("alpha_pattern", "lora_alpha")
    assert (a.shape, b.shape) == ((rank, base.shape[1]), (base.shape[0], rank))
    assert name in config["target_modules"]
    total = base + alpha / rank * b @ a
    if not config["use_dora"]:
        return total
    norm = np.linalg.norm(total, axis=1)
    return (tensors[f"{prefix}.lora_magnitude_vector"] / norm)[:, None] * total


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_peft_computes_the_same_weights(tmp_path, use_dora):
    params = {
        "layers": [
            {"q_proj": {"kernel": normal(32, 20)}, "o_proj": {"kernel": normal(4, 16, 24)}},
        ],
        "mlp": {"weight": normal(20, 32)},
        "stack": normal(3, 32, 20),
        "norm": jnp.ones(5),
    }
    rules = [
        Rule("layers/0/o_proj/*", CONFIG, axis=(0, 1), group_size=(1, 16)),
        Rule("mlp/*", CONFIG, axis=1),
        Rule("stack", CONFIG, axis=1),
        Rule("layers/0/q_proj/*", CONFIG, axis=0),
    ]
    rank = {"mlp/*": 5, "*": 3}
    tree = lora_init(params, rules, rank, KEY, alpha=6.0, use_rslora=True, use_dora=use_dora)
    tree = jax.tree.map(
        lambda x: trained(x) if isinstance(x, jq.training.LowRank) else x,
        tree,
        is_leaf=lambda x: isinstance(x, jq.training.LowRank),
    )
    names = {
        "layers/0/q_proj/kernel": "model.layers.0.q_proj",
        "layers/0/o_proj/kernel": "model.layers.0.o_proj",
        "mlp/weight": "model.mlp",
        "stack": "model.stack.{}.proj",
    }
    save_peft(tmp_path / "a", tree, names, base_model="a/b", task_type="CAUSAL_LM")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["use_dora"]) == ("LORA", 3, use_dora)
    assert (config["base_model_name_or_path"], config["task_type"]) == ("a/b", "CAUSAL_LM")

    def check(name, x, matrix):
        base, expected = (
            matrix(np.asarray(y, np.float64)) for y in (x.base.dequantize(), x.dequantize())
        )
        found = weight_by_peft(tmp_path / "a", name, base)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    layer = tree["layers"][0]
    check("model.layers.0.q_proj", layer["q_proj"]["kernel"], lambda w: w.T)
    check("model.layers.0.o_proj", layer["o_proj"]["kernel"], lambda w: w.reshape(64, 24).T)
    check("model.mlp", tree["mlp"]["weight"], lambda w: w)
    for i in range(3):
        check(f"model.stack.{i}.proj", tree["stack"], lambda w, i=i: w[i].T)
    start = lora_init(params, rules, 1, jax.random.key(1), use_dora=use_dora)
    read = load_peft(tmp_path / "a", start, names)
    assert jax.tree.structure(read) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, read, tree)


def test_names_follow_from_paths_and_dtypes_are_kept(tmp_path):
    params = {"model.q_proj.weight": normal(32, 20), "layers": [{"k": {"kernel": normal(32, 20)}}]}
    tree = lora_init(params, Rule("*", CONFIG), 2, KEY, dtype=jnp.bfloat16)
    save_peft(tmp_path / "a", tree)
    with safetensors.safe_open(tmp_path / "a" / "adapter_model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == [
            "base_model.model.layers.0.k.lora_A.weight",
            "base_model.model.layers.0.k.lora_B.weight",
            "base_model.model.model.q_proj.lora_A.weight",
            "base_model.model.model.q_proj.lora_B.weight",
        ]
        assert file.get_slice("base_model.model.layers.0.k.lora_A.weight").get_dtype() == "BF16"
    save_peft(tmp_path / "b", tree, lambda path: path.split(".")[-1].replace("/", "_"))
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["layers_0_k_kernel", "weight"]


def write_adapter(folder, config, tensors):
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefixed = {f"base_model.model.{name}": x for name, x in tensors.items()}
    safetensors.numpy.save_file(prefixed, folder / "adapter_model.safetensors")


def factors(name, rank, inputs=32, outputs=20):
    """Tensors of PEFT for a layer."""
    a, b = np.asarray(normal(rank, inputs, seed=1)), np.asarray(normal(outputs, rank, seed=2))
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
def test_patterns_and_rslora_of_a_file_are_applied(tmp_path, use_rslora):
    params = {"m": {"q": {"kernel": normal(32, 20)}, "k": {"kernel": normal(32, 20)}}}
    tensors = factors("m.q", 2) | factors("m.k", 5)
    patterns = {"rank_pattern": {"k": 5}, "alpha_pattern": {"k": 3}, "use_rslora": use_rslora}
    write_adapter(tmp_path / "a", patterns, tensors)
    tree = load_peft(tmp_path / "a", lora_init(params, Rule("*", CONFIG), 1, KEY))
    for name, rank, alpha in (("q", 2, 8), ("k", 5, 3)):
        x = tree["m"][name]["kernel"]
        down, up = (np.asarray(tensors[f"m.{name}.lora_{side}.weight"]) for side in "AB")
        factor = alpha / (np.sqrt(rank) if use_rslora else rank)
        wanted = np.asarray(x.base.dequantize()) + factor * (up @ down).T
        np.testing.assert_allclose(x.dequantize(), wanted, rtol=1e-5, atol=1e-5)


PLAIN = lora_init({"m": {"kernel": normal(32, 20)}}, Rule("*", CONFIG), 2, KEY)
STACKED = lora_init({"m": normal(2, 32, 20)}, Rule("*", CONFIG), 2, KEY)
WITH_NORMS = lora_init({"m": {"kernel": normal(32, 20)}}, Rule("*", CONFIG), 2, KEY, use_dora=True)
MIXED = {**factors("m", 3), "m.lora_A.weight": factors("m", 2)["m.lora_A.weight"]}
FLAT = {**factors("m", 2), "m.lora_A.weight": np.ones(32, np.float32)}
NORMS = {**factors("m", 2), "m.lora_magnitude_vector": np.ones(7, np.float32)}
READ_ERRORS = {
    "no adapters": ({}, factors("m", 2), {"w": jnp.ones(3)}, None, "without adapters, .* w"),
    "type": ({"peft_type": "IA3"}, factors("m", 2), PLAIN, None, "peft_type='LORA'.* got 'IA3'"),
    "bias": ({"bias": "all"}, factors("m", 2), PLAIN, None, "bias='none'.* got 'all'"),
    "modules": (
        {"modules_to_save": ["head"]},
        factors("m", 2),
        PLAIN,
        None,
        "to_save=None",
    ),
    "missing": ({}, factors("x", 2), PLAIN, None, "must have 'base_model.model.m.lora_A.weight'"),
    "left": ({}, factors("m", 2) | factors("x", 2), PLAIN, None, r"x.lora_A.* layers are \['m'\]"),
    "shape": ({}, factors("m", 2, 16), PLAIN, None, r"for m/kernel, 32 and 20; got \(16, 2\)"),
    "ranks": ({}, MIXED, PLAIN, None, r"got \(32, 2\) and \(3, 20\)"),
    "rank": ({}, factors("m", 0), PLAIN, None, r"got \(32, 0\) and \(0, 20\)"),
    "axes": ({}, FLAT, PLAIN, None, r"got \(32,\) and \(2, 20\)"),
    "norms": ({"use_dora": True}, NORMS, WITH_NORMS, None, r"m must have 20 magnitudes; got \(7,"),
    "dora": ({"use_dora": True}, factors("m", 2), PLAIN, None, "use_dora=True, unlike the tree"),
    "stack": (
        {},
        factors("m.0", 2) | factors("m.1", 3),
        STACKED,
        {"m": "m.{}"},
        r"one rank and alpha; got \[\(2, 8.0\), \(3, 8.0\)\]",
    ),
    "name": ({}, factors("m", 2), STACKED, {"m": "m"}, "place for the number"),
}


BROKEN_CONFIGS = {
    "cut off": ('{"peft_type": ', "is not a JSON object, JSONDecodeError: Exp"),
    "a list": ("[1]", "is not a JSON object"),
    "bytes": ("\udcff", "is not a JSON object"),
    "no alpha": ('{"peft_type": "LORA"}', "a number as lora_alpha.*; got lora_alpha=None"),
    "text": ('{"peft_type": "LORA", "lora_alpha": "8"}', "got lora_alpha='8' and"),
    "a truth value": ('{"peft_type": "LORA", "lora_alpha": true}', "got lora_alpha=True and"),
    "NaN": ('{"peft_type": "LORA", "lora_alpha": NaN}', "got lora_alpha=nan and"),
    "pattern": (
        '{"peft_type": "LORA", "lora_alpha": 8, "alpha_pattern": {"m": null}}',
        r"alpha_pattern=\{'m': None\}",
    ),
    "patterns": (
        '{"peft_type": "LORA", "lora_alpha": 8, "alpha_pattern": [3]}',
        r"alpha_pattern=\[3\]",
    ),
}


@pytest.mark.parametrize("name", BROKEN_CONFIGS)
def test_an_error_about_a_config_names_its_file(tmp_path, name):
    text, words = BROKEN_CONFIGS[name]
    write_adapter(tmp_path / "a", {}, factors("m", 2))
    (tmp_path / "a" / "adapter_config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"a.adapter_config.json .*{words}"):
        load_peft(tmp_path / "a", PLAIN)


@pytest.mark.parametrize("name", READ_ERRORS)
def test_files_that_do_not_match_raise(tmp_path, name):
    config, tensors, tree, names, text = READ_ERRORS[name]
    write_adapter(tmp_path / "a", config, tensors)
    with pytest.raises(ValueError, match=text):
        load_peft(tmp_path / "a", tree, names)


TREE = lora_init({"a": {"w": normal(32, 20)}, "b": normal(2, 32, 20)}, Rule("*", CONFIG), 2, KEY)
NORMED = lora_init({"c": {"w": normal(32, 20)}}, Rule("*", CONFIG), 2, KEY, use_dora=True)
ERRORS = {
    "some norms": (
        {"a": TREE["a"], **NORMED},
        None,
        "DoRA in all layers or in none; got 'a' without norms",
    ),
    "no adapters": ({"w": jnp.ones(3)}, None, "without adapters, with paths w"),
    "no name": (TREE, {"a/w": "a"}, r"layer of each path with adapters; got .* without 'b'"),
    "stack": (TREE, None, r"b is a stack of 2 layers.* such as 'layers.\{\}.q_proj'; got 'b'"),
    "same name": ([TREE["a"]["w"]] * 2, lambda _: "q", "Each layer needs its own name; got 'q'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_to_do(tmp_path, name):
    tree, names, text = ERRORS[name]
    with pytest.raises(ValueError, match=text):
        save_peft(tmp_path / "a", tree, names)
    assert not (tmp_path / "a").exists()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="exists; choose a new folder"):
        save_peft(tmp_path, {"q": {"w": TREE["a"]["w"]}})
