import dataclasses
import json
import os
import re
import resource
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import rich.progress
import safetensors.numpy

import jaxquant
from jaxquant import (
    SCHEMES,
    QTensor,
    Statistics,
    checkpoints,
    demo,
    load,
    methods,
    quantize,
    save,
    tree,
)
from jaxquant.__main__ import main
from jaxquant.tree.internal import read_arrays

from .checkpoints.gguf_files import gguf
from .demo import encoders, llamas
from .tree.trees import normal, parameters


@pytest.fixture
def model(tmp_path):
    """A file as PyTorch writes it: kernels are (out, in)."""
    arrays = {
        "layers.0.gate.weight": normal(32, 256),
        "layers.0.up.weight": normal(64, 256, seed=1),
        "layers.0.norm.weight": normal(256, seed=2),
        "lm_head.weight": normal(96, 128, seed=3),
        "ids": np.arange(6).reshape(2, 3),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def run(capsys):
    """Runs a command; returns the exit status and what was printed to each stream."""

    def run(*arguments):
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as error:  # argparse exits this way.
            status = error.code
        written = capsys.readouterr()
        return status, written.out, written.err

    return run


def scales_of(path):
    """Shape of the scales of each quantized leaf, by its name."""
    return {k: q.scale.shape for k, q in load(path).items() if isinstance(q, QTensor)}


@pytest.mark.slow
def test_quantize_writes_a_tree_and_prints_the_report(model, run, tmp_path):
    status, out, err = run("quantize", model, tmp_path / "small", "--scheme", "W8A8")
    assert status == 0, err
    for text in (
        "layers.0.gate.weight",
        "int8 per channel, int8 inputs",
        "3 of 5 leaves quantized",
    ):
        assert text in out
    assert "a norm or bias, by its name" in out
    assert scales_of(tmp_path / "small") == {
        "layers.0.gate.weight": (32, 1),
        "layers.0.up.weight": (64, 1),
        "lm_head.weight": (96, 1),
    }
    arrays = read_arrays(model)
    found = load(tmp_path / "small")
    np.testing.assert_array_equal(found["ids"], arrays["ids"])
    np.testing.assert_array_equal(found["layers.0.norm.weight"], arrays["layers.0.norm.weight"])
    wanted = tree.quantize(arrays, tree.default_rules(SCHEMES["W8A8"], axis=-1))
    np.testing.assert_array_equal(
        found["lm_head.weight"].dequantize(), wanted["lm_head.weight"].dequantize()
    )


@pytest.mark.slow
def test_json_is_the_report_and_nothing_else(model, run, tmp_path):
    status, out, err = run("quantize", model, tmp_path / "small", "--scheme", "w4a16", "--json")
    assert (status, err) == (0, "")
    values = json.loads(out)
    rows = {row["path"]: row for row in values["rows"]}
    assert rows["layers.0.up.weight"]["scheme"] == "int4 g128"
    assert 15 < rows["layers.0.up.weight"]["sqnr"] < 25
    assert values["total"]["bytes_after"] < values["total"]["bytes_before"] / 6


def test_the_axis_option_applies_to_matrices(model, run, tmp_path):
    status, _, err = run(
        "quantize", model, tmp_path / "small", "--scheme", "W8A8", "--axis", "-2",
        "--rule", "lm_head*=W8A16",
    )  # fmt: skip
    assert status == 0, err
    found = load(tmp_path / "small")
    for name, width in (("layers.0.gate.weight", 256), ("lm_head.weight", 128)):
        q = found[name]
        assert [q.scale.shape[a] for a in q.stored_axes((0, 1))] == [1, width]


def test_rules_precede_the_scheme_and_the_first_match_applies(model, run, tmp_path):
    status, out, err = run(
        "quantize", model, tmp_path / "small", "--scheme", "W8A8", "--json",
        "--rule", "*gate*=none", "--rule", "re:.*(up|gate).*=W4A16", "--rule", "*up*=FP8",
    )  # fmt: skip
    assert status == 0, err
    rows = {row["path"]: row for row in json.loads(out)["rows"]}
    assert rows["layers.0.gate.weight"]["reason"] == "left by rule '*gate*'"
    assert rows["layers.0.up.weight"]["scheme"] == "int4 g128"
    assert rows["lm_head.weight"]["scheme"] == "int8 per channel, int8 inputs"


def test_without_a_scheme_rules_leave_the_rest_in_float(model, run, tmp_path):
    assert run("quantize", model, tmp_path / "small", "--rule", "lm=head=W8A8")[0] == 2
    status, _, err = run("quantize", model, tmp_path / "small", "--rule", "lm_head.weight=W8A8")
    assert status == 0, err
    assert set(scales_of(tmp_path / "small")) == {"lm_head.weight"}


def test_quantize_by_a_method_with_statistics(model, run, tmp_path):
    scheme, arrays = "NF4A16", read_arrays(model)
    names = ["layers.0.gate.weight", "lm_head.weight"]
    moments = {
        name: methods.SecondMoment.init(arrays[name].shape[1]).update(
            jnp.asarray(normal(50, arrays[name].shape[1], seed=i))
        )
        for i, name in enumerate(names)
    }
    found = Statistics({name: {methods.SecondMoment: m} for name, m in moments.items()})
    found.save(tmp_path / "statistics")
    for source in (model, tmp_path / "saved"):
        save(tmp_path / "saved", arrays)
        status, _, err = run(
            "quantize", source, tmp_path / "small", "--rule", f"{names[0]}={scheme}",
            "--rule", f"{names[1]}={scheme}", "--method", "gptq",
            "--statistics", tmp_path / "statistics",
        )  # fmt: skip
        assert status == 0, err
        rules = [tree.Rule(name, SCHEMES[scheme], axis=-1) for name in names]
        wanted = tree.quantize(
            arrays, rules, method=methods.GPTQ(importance=True), statistics=found
        )
        for name in names:
            np.testing.assert_array_equal(
                load(tmp_path / "small")[name].dequantize(), wanted[name].dequantize()
            )


def test_methods_that_lack_statistics_say_so(model, run, tmp_path):
    arguments = ["quantize", model, tmp_path / "small", "--scheme", "W4A16", "--axis", "-1"]
    status, _, err = run(*arguments, "--method", "importance")
    assert (status, "statistics must have those of layers.0.gate.weight" in err) == (2, True)
    assert not (tmp_path / "small").exists()
    status, _, err = run(*arguments, "--statistics", model, "--method", "sinq")
    assert (status, "was not written by jaxquant.save" in err) == (2, True), err


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("option, name", [("-2", "a.weight"), ("-1", "a.kernel")])
def test_quantize_warns_where_the_axis_may_be_wrong(run, tmp_path, option, name):
    arrays = {name: normal(64, 32), "query": normal(4, 64, 32), "head": normal(64, 32)}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    source, target = tmp_path / "model.safetensors", tmp_path / "small"
    status, out, err = run(
        "quantize", source, target, "--scheme", "W8A8", "--axis", option, "--json"
    )
    assert status == 0, err
    warnings = {row["path"]: row["warning"] for row in json.loads(out)["rows"]}
    assert re.match(r"taken as \(\w+, \w+\); if it is .*--axis -[12]", warnings[name])
    assert warnings["query"].startswith("taken as a stack of matrices")
    assert warnings["head"] is None


def test_a_saved_tree_can_be_quantized_further(run, tmp_path):
    save(tmp_path / "a", parameters() | {"name": "text"})
    status, _, err = run("quantize", tmp_path / "a", tmp_path / "b", "--rule", "out/0=W8A8")
    assert status == 0, err
    status, _, err = run("quantize", tmp_path / "b", tmp_path / "c", "--rule", "embed*=W8A8")
    assert status == 0, err
    found = load(tmp_path / "c")
    assert isinstance(found["out"][0], QTensor)
    assert isinstance(found["embed"]["table"], QTensor)
    assert found["name"] == "text"
    status, out, err = run("quantize", tmp_path / "c", tmp_path / "d", "--rule", "out/0=W8A8")
    assert (status, out) == (2, "")
    assert "out/0: already quantized" in err
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "./x/../model.safetensors", "link", "hard"])
def test_input_and_output_must_be_two_files(model, run, tmp_path, monkeypatch, name):
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to("model.safetensors")
    (tmp_path / "hard").hardlink_to(model)
    monkeypatch.chdir(tmp_path)
    before = model.read_bytes()
    monkeypatch.setattr(tree, "quantize", None)
    for names in ((model, name), (name, model)):
        status, out, err = run("quantize", *names, "--scheme", "W8A8")
        assert (status, out) == (2, "")
        assert err.endswith("are the same file; name another for the result\n")
        for option in ("--plot", "--html"):
            status, out, err = run("inspect", names[0], option, names[1])
            assert (status, out) == (2, "")
            assert err.endswith("are the same file; name another for the result\n")
    assert model.read_bytes() == before
    assert (tmp_path / "link").is_symlink()


def test_inspect_shows_the_report_stored_in_the_file(model, run, tmp_path):
    _, report, _ = run("quantize", model, tmp_path / "small", "--scheme", "W8A8", "--json")
    status, out, err = run("inspect", tmp_path / "small", "--json")
    assert (status, err) == (0, "")
    for wanted, found in zip(json.loads(report)["rows"], json.loads(out)["rows"], strict=True):
        for name in ("path", "shape", "scheme", "bytes_before", "bytes_after", "sqnr", "codes"):
            assert found[name] == wanted[name]
    status, table, _ = run("inspect", tmp_path / "small")
    assert status == 0
    assert "3 of 5 leaves quantized" in table
    assert "left as float32, 1 axis" in table


@pytest.mark.parametrize("metadata", [{"sqnr": "42"}, {"sqnr": "high"}, {}])
def test_inspect_shows_any_file(model, run, tmp_path, metadata):
    save(tmp_path / "a", parameters(), metadata)
    for path, text in ((tmp_path / "a", "layers/up/kernel"), (model, "layers.0.up.weight")):
        status, out, err = run("inspect", path)
        assert (status, err) == (0, "")
        assert text in out
        assert "0 of " in out


def test_inspect_draws_a_picture(model, run, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need jaxquant[plot]")
    run("quantize", model, tmp_path / "small", "--scheme", "W8A8")
    status, out, err = run("inspect", tmp_path / "small", "--plot", tmp_path / "small.png")
    assert (status, err) == (0, "")
    assert "lm_head.weight" in out
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "small.png").stat().st_size > 10_000


BAD = [
    (
        ["quantize", "{model}", "{out}"],
        "model.safetensors: give --scheme NAME, --rule PATTERN=NAME",
    ),
    (
        ["quantize", "{model}", "{out}", "--scheme", "W3"],
        "'W3' is not a scheme; choose one of W8A8",
    ),
    (["quantize", "{model}", "{out}", "--rule", "W8A8"], "'W8A8' is not of the form PATTERN=NAME"),
    (["quantize", "{model}", "{out}", "--rule", "=W8A8"], "'=W8A8' is not of the form PATTERN="),
    (["quantize", "{model}", "{out}", "--rule", "*=W3"], "'W3' is not a scheme; choose one of"),
    (["quantize", "{model}", "{out}", "--rule", "re:(=W8A8"], "a regular expression; got 're:('"),
    (["quantize", "{model}", "{out}", "--rule", "head=W8A8"], "rule 'head' matches no leaf; the p"),
    (["quantize", "{model}", "{out}", "--scheme", "W8A8", "--axis", "5"], "got axis=5"),
    (["quantize", "{model}", "{out}", "--scheme", "W8A8", "--axis", "x"], "invalid int value: 'x'"),
    (
        ["quantize", "{model}", "{out}", "--rule", "ids=W8A8"],
        "ids: not a floating-point array, got int",
    ),
    (["quantize", "{folder}/none", "{out}", "--scheme", "W8A8"], "No such file or directory"),
    (["quantize", "{model}", "{folder}/no/out", "--scheme", "W8A8"], "no is not a folder; create"),
    (["quantize", "{model}", "{folder}", "--scheme", "W8A8"], " is a folder; name a file, such"),
    (["quantize", "{model}", ".", "--scheme", "W8A8"], ": . is a folder; name a file, such as mo"),
    # The output path is checked before the source is read.
    (["quantize", "{text}", "{folder}/no/out", "--scheme", "W8A8"], "no is not a folder; create"),
    (["quantize", "{text}", "{out}", "--scheme", "W8A8"], "is not a checkpoint: it starts with "),
    (["inspect", "{folder}/none"], "No such file or directory"),
    (["inspect", "{index}"], "weight_map.a must be the name of a .safetensors file in the same f"),
    (["quantize", "{index}", "{out}", "--scheme", "W8A8"], "weight_map.a must be the name of a .s"),
    (["inspect", "{model}", "--html", "{folder}"], "is a folder"),
    (["inspect", "{model}", "--html", "{folder}/none/a"], "is not a folder; create it first"),
    (["inspect", "{model}", "--html", ""], "is a folder"),
    (["inspect", "{folder}", "--plot", "{out}"], "--plot needs a safetensors file; got "),
    (["quantize", "{model}", "{fifo}", "--scheme", "W8A8"], "fifo is a device, FIFO or socket (m"),
    (["quantize", "{model}", "/dev/null", "--scheme", "W8A8"], "null is a device, FIFO or socket"),
    (["inspect", "{fifo}"], "fifo is a device, FIFO or socket (mode prw"),
    (["inspect", "{sqnr}"], "sqnr: its metadata 'jaxquant.sqnr' is malformed: 'high'"),
    (["inspect", "{text}"], "is not a checkpoint: it starts with "),
    (["inspect", "{broken}"], "broken was altered: "),
    (["inspect", "{model}", "--plot", "{out}"], "No leaf of 5 is quantized; there is nothing to"),
    (["demo", "--encoder", "{folder}"], "No such file or directory"),
    (["demo", "--sentences", "x"], "invalid int value: 'x'"),
    (["demo", "--only", "W3"], "invalid choice: 'W3'"),
    (["demo", "--encoder", "{encoder}", "--sentences", "5"], "must hold 11 sentences or more"),
    (["demo", "--encoder", "{encoder}", "--sentences", "-5"], "usable sentences; got count=-5"),
    (["quantize"], "the following arguments are required"),
    (["generate", "a", "--scheme", "W3"], "'W3' is not a scheme; choose one of W8A8"),
    (["generate", "a", "--kv", "int2"], "invalid choice: 'int2'"),
    (["generate", "a", "--model", "{folder}/none"], "No such file or directory"),
    (["generate", "a", "--model", "{text}"], "is not a GGUF file"),
    (["generate", "a", "--model", "{folder}"], "must be one of llama, mistral; got None"),
    (["fly"], "invalid choice: 'fly'"),
    ([], "the following arguments are required: command"),
]


@pytest.mark.parametrize("arguments, text", BAD, ids=[" ".join(a) or "nothing" for a, _ in BAD])
def test_errors_print_one_message_and_exit_with_status_2(
    model, run, tmp_path, tiny, arguments, text
):
    (tmp_path / "text").write_text("Once upon a time there was a file of text.\n")
    data = model.read_bytes()
    (tmp_path / "broken").write_bytes(data.replace(b'"F32"', b'"F33"'))
    (tmp_path / "index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": "b"}}))
    os.mkfifo(tmp_path / "fifo")
    save(tmp_path / "sqnr", {"a": np.ones(2)}, {"jaxquant.sqnr": "high"})
    names = {"folder": tmp_path, "model": model, "out": tmp_path / "out", "encoder": tiny}
    names |= {name: tmp_path / name for name in ("text", "broken", "fifo", "sqnr")}
    names["index"] = tmp_path / "index.json"
    files = {p.name for p in tmp_path.iterdir()}

    status, out, err = run(*(a.format(**names) for a in arguments))

    assert (status, out) == (2, "")
    assert text in err
    assert "Traceback" not in err
    assert {p.name for p in tmp_path.iterdir()} == files
    assert model.read_bytes() == data


def test_files_are_inspected_by_what_they_hold_not_by_their_names(model, run, tmp_path):
    blocks = np.random.default_rng(0).integers(0, 60, (8, 2, 18), np.uint8)
    (tmp_path / "sha256-1b2c").write_bytes(gguf([], [("w", (8, 64), 2, blocks.tobytes())]))
    status, out, err = run("inspect", tmp_path / "sha256-1b2c")
    assert (status, err) == (0, "")
    assert "Q4_0" in out
    model.rename(tmp_path / "misnamed.gguf")
    status, out, err = run("inspect", tmp_path / "misnamed.gguf")
    assert (status, err) == (0, "")
    assert "Quantization by leaf" in out
    (tmp_path / "text.gguf").write_text("Once upon a time")
    status, out, err = run("inspect", tmp_path / "text.gguf")
    assert (status, out) == (2, "")
    assert "text.gguf is not a checkpoint: it starts with b'Once upon'. Name a safe" in err


def test_folders_and_gguf_files_are_quantized_and_inspected(model, run, tmp_path):
    status, out, err = run("inspect", tmp_path)
    assert (status, err) == (0, "")
    assert "lm_head.weight" in out
    assert "5 of 5" in out
    status, _, err = run("quantize", tmp_path, tmp_path / "a", "--scheme", "W8A8")
    assert status == 0, err
    run("quantize", model, tmp_path / "b", "--scheme", "W8A8")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    blocks = np.random.default_rng(0).integers(0, 60, (8, 2, 18), np.uint8)
    (tmp_path / "c.gguf").write_bytes(gguf([], [("w", (8, 64), 2, blocks.tobytes())]))
    status, out, err = run("inspect", tmp_path / "c.gguf")
    assert (status, err) == (0, "")
    assert "Q4_0" in out
    given = "quantize", tmp_path / "c.gguf", tmp_path / "d", "--scheme", "W8A8"
    status, _, err = run(*given)
    assert status == 2
    assert "w: stored quantized" in err
    assert "--requantize" in err
    status, _, err = run(*given, "--requantize")
    assert status == 0, err
    found, floats = load(tmp_path / "d")["w"], checkpoints.open(tmp_path / "c.gguf").load(["w"])
    wanted = quantize(floats["w"].dequantize(), SCHEMES["W8A8"].weights, axis=1)
    np.testing.assert_array_equal(found.codes, wanted.codes)
    # So is a tree that was quantized before; what no rule quantizes stays as it is.
    save(tmp_path / "e", {"w": [floats["w"]], "v": floats["w"]})
    given = "quantize", tmp_path / "e", tmp_path / "f", "--rule", "w/0=W8A8", "--axis", "-1"
    status, _, err = run(*given, "--requantize")
    assert status == 0, err
    found = load(tmp_path / "f")
    np.testing.assert_array_equal(found["w"][0].codes, wanted.codes)
    assert found["v"].format == floats["w"].format


def test_a_full_disk_prints_one_message_and_leaves_no_file(model, run, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        status, out, err = run("quantize", model, tmp_path / "out", "--scheme", "W8A8", "--json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (status, out) == (2, "")
    assert err == (
        f"jaxquant quantize: [Errno 27] File too large; could not write: '{tmp_path / 'out'}'\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_unreadable_file_prints_one_message(model, run, monkeypatch):
    def deny(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(model))

    monkeypatch.setattr("builtins.open", deny)
    status, out, err = run("inspect", model)
    assert (status, out) == (2, "")
    assert err == f"jaxquant inspect: [Errno 13] Permission denied: '{model}'\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    encoders.write_encoder(folder)
    return folder


@pytest.mark.slow
def test_demo_compares_the_requested_schemes(run, tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(
        demo, "documentation_sentences", lambda n: asked.append(n) or encoders.sentences(n)
    )
    monkeypatch.setattr(demo, "tokenize", short_tokens(demo.tokenize))
    monkeypatch.setattr(demo, "packaged_llama", not_installed)
    drawn = []

    def update(bar, task, *, completed, description, total=None):
        if total:  # Otherwise it is the bar for the leaves of one tree.
            drawn.append((completed, total, description))

    monkeypatch.setattr(rich.progress.Progress, "update", update)
    arguments = ["demo", "--encoder", tiny, "--sentences", "12", "--only", "W8A8", "--only", "FP8"]
    status, out, err = run(*arguments, "--json")
    assert status == 0, err
    rows = json.loads(out)
    assert [row["name"] for row in rows["encoder"]] == ["float32", "W8A8", "FP8"]
    assert (rows["language"], rows["missing"]) == ([], ["llm-x is not installed"])
    assert asked == [12]
    status, out, err = run(*arguments)
    assert status == 0, err
    assert "Sentence encoder, quantized" in out
    assert drawn == [(1, 3, "float32"), (2, 3, "W8A8"), (3, 3, "FP8")] * 2
    assert all(name in out for name in ("float32", "W8A8", "FP8", "10-NN overlap"))
    assert "A table was left out. llm-x is not installed" in err


def not_installed():
    raise demo.NotInstalledError("llm-x is not installed")


def test_demo_without_any_model_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(demo, "packaged_encoder", not_installed)
    monkeypatch.setattr(demo, "packaged_llama", not_installed)
    status, out, err = run("demo")
    assert (status, out) == (2, "")
    assert (
        err
        == "jaxquant demo: No model is installed. llm-x is not installed llm-x is not installed\n"
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "tiny.gguf"
    llamas.write_gguf(path, llamas.random_arrays())
    return path


@pytest.mark.slow
def test_demo_compares_variants_of_a_language_model(run, llama, monkeypatch):
    monkeypatch.setattr(demo, "held_out_text", lambda: "the end in 12 " * 200)
    monkeypatch.setattr(demo, "packaged_encoder", not_installed)
    rows = "as stored", "float32, int8 keys and values"
    only = [word for name in rows for word in ("--only", name)]
    arguments = ["demo", "--model", llama, "--windows", 1, *only]
    status, out, err = run(*arguments, "--json")
    assert status == 0, err
    values = json.loads(out)
    assert (values["encoder"], values["missing"]) == ([], [])
    assert [row["name"] for row in values["language"]] == list(rows)
    assert values["language"][0]["agreement"] == 1
    status, out, err = run(*arguments)
    assert status == 0, err
    assert "Language model, quantized" in out
    assert "the model's file is quantized, and this is what it dequantizes to" in out
    assert "Sentence encoder" not in out
    status, out, err = run(*arguments, "--only", "W8A8")
    assert status == 0, err
    assert "Language model, quantized" in out
    assert "A table was left out. llm-x is not installed" in err


def continued(llama, prompt, count, scheme=None, store=jnp.bfloat16, is_chat=False):
    model = demo.load_llama(llama)
    if scheme is not None:
        params = demo.requantize(model.params, scheme)
        model = dataclasses.replace(model, params=params)
    vocabulary = demo.read_vocabulary(model.checkpoint)
    ids = vocabulary.encode_chat(prompt) if is_chat else vocabulary.encode(prompt)
    return list(vocabulary.pieces(demo.generate(model, ids, count, store=store)))


@pytest.mark.slow
def test_generate_streams_a_text_and_its_speed(run, llama, monkeypatch):
    written = []

    def write(text, **options):
        written.append((text, options))

    monkeypatch.setattr("jaxquant.__main__.print", write, raising=False)
    status, _, err = run("generate", "the end", "--model", llama, "--max-tokens", "5")
    assert status == 0, err
    *pieces, (summary, options) = written
    assert [text for text, _ in pieces] == continued(llama, "the end", 5)
    assert all(o == {"end": "", "flush": True} for _, o in pieces)
    assert re.fullmatch(r"\n5 tokens, \d+\.\d tokens per second", summary)
    assert options == {"file": sys.stderr}


@pytest.mark.slow
def test_generate_requantizes_and_prints_json(run, llama):
    status, out, err = run(
        "generate", "in 12", "--model", llama, "--max-tokens", "4", "--scheme", "w4a16",
        "--kv", "int8", "--json",
    )  # fmt: skip
    assert (status, err) == (0, "")
    values = json.loads(out)
    want = continued(llama, "in 12", 4, SCHEMES["W4A16"], demo.STORES["int8"])
    assert (values["text"], values["tokens"]) == ("".join(want), 4)
    assert values["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--max-tokens", "0"], "number of tokens to generate must be at least 1; got 0"),
        (["--temperature", "-1"], "temperature must be 0 or a positive number; got -1.0"),
        (["--seed", "-1"], "seed must be 0 to 4294967295; got -1"),
    ],
)
def test_generate_checks_its_arguments_before_it_reads_a_model(run, monkeypatch, options, text):
    monkeypatch.setattr(demo, "load_llama", lambda *_, **__: pytest.fail("it read the model"))
    status, _, err = run("generate", "the", "--model", "none.gguf", *options)
    assert status != 0
    assert text in err


@pytest.mark.slow
def test_generate_answers_and_samples(run, llama):
    pytest.importorskip("jinja2", reason="pip install -e '.[test]'")
    common = ["generate", "the", "--model", llama, "--max-tokens", "6", "--json", "--chat"]
    texts = []
    for options in ([], *(["--temperature", "9", "--seed", str(s)] for s in (1, 1, 2))):
        status, out, err = run(*common, *options)
        assert (status, err) == (0, "")
        texts.append(json.loads(out)["text"])
    assert texts[0] == "".join(continued(llama, "the", 6, is_chat=True))
    assert texts[1] == texts[2] != texts[3]


@pytest.mark.slow
def test_generate_keeps_compiled_programs(llama, tmp_path):
    """In the user's cache folder, for the next process."""
    command = [sys.executable, "-m", "jaxquant", "generate", "the", "--model", str(llama)]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [*command, "--max-tokens", "2"],
        env=environment | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(continued(llama, "the", 2))
    assert "2 tokens, " in done.stderr
    assert [p for p in (tmp_path / "jaxquant").iterdir() if "next_token" in p.name]


def short_tokens(tokenize):
    """The tiny encoder has fewer positions than the demo's sentences."""
    return lambda texts, folder: tokenize(texts, folder, length=16, batch_size=4)


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["generate"], ["quantize"], ["inspect"]], ids=str
)
def test_help_shows_examples(run, command):
    status, out, err = run(*command, "--help")
    assert (status, err) == (0, "")
    assert "examples:\n  jaxquant demo\n" in out
    assert "--rule 're:.*gate.*=none'" in out
    if command:
        assert "--json" in out


def test_version_prints_the_version_of_the_package(run):
    assert run("--version") == (0, f"jaxquant {jaxquant.__version__}\n", "")


@pytest.mark.slow
def test_the_package_runs_as_a_program():
    command = [sys.executable, "-m", "jaxquant"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("demo", "quantize", "inspect", "examples:"))
    done = subprocess.run(
        [*command, "inspect", "none"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("jaxquant inspect: ")
