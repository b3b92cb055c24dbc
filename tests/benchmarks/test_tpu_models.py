"""How a whole model is divided for the TPU compiler, and what its programs may not gather."""

import argparse
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq
from benchmarks import tpu_models
from benchmarks.tables import markdown
from benchmarks.tpu_models import Sizes, Step, gathered, placed

MESH = jax.sharding.AbstractMesh((8,), ("model",))


def test_the_models_have_as_many_parameters_as_they_are_named_for():
    counts = [
        sum(math.prod(x.shape) for x in jax.tree.leaves(sizes.params()))
        for sizes in tpu_models.MODELS
    ]
    # Qwen3 has 30.53e9, and here twice its keys and values.
    assert counts == pytest.approx([8.03e9, 30.53e9 + 48 * 2 * 512 * 2048], rel=1e-3)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16"])
def test_kernels_are_divided_along_columns_or_rows(scheme):
    rule = jq.Rule("layers/*/kernel", jq.SCHEMES[scheme], axis=-1)
    params = Sizes(layers=2, width=1024, hidden=2048, vocabulary=64).params()
    params = jax.eval_shape(lambda p: jq.tree.quantize(p, rule, platform="tpu"), params)
    found = placed(params, MESH)
    (layers,) = found["layers"]
    logical = {"query": 1, "up": 1, "out": 2, "down": 2}
    for name, axis in logical.items():
        q = layers[name]["kernel"]
        (stored,) = q.stored_axes([axis])
        assert tuple(q.codes.sharding.spec).index("model") == stored
        is_shared = q.scale.shape[stored] == 1
        assert ("model" in q.scale.sharding.spec) != is_shared
    assert layers["mlp_norm"].sharding.spec == jax.P()
    assert found["head"].sharding.spec == jax.P("model")


def test_gathers_of_more_than_the_activations_are_found():
    text = """
  %a = bf16[8,4096]{1,0} all-gather(%x), replica_groups={}
  %b = (s8[64,128]{1,0}, s8[512,4096]{1,0}) all-gather-start(%y), replica_groups={}
  %c = f32[8192,4096]{1,0} all-reduce(%z)
"""
    assert gathered(text, 8 * 4096) == 512 * 4096
    assert gathered(text, 512 * 4096) == 0


def test_cells_are_red_where_a_scheme_is_slower_or_too_large():
    def result(time, size=1e9, moved=0, is_whole=True):
        return {
            "chip": "v5e",
            "compiler_estimate_milliseconds": time,
            "memory_bytes": size,
            "gathered_bytes": moved,
            "is_whole": is_whole,
        }

    cell = tpu_models._cell
    assert cell(result(2.0), result(3.0)) == "2.00 ms · 1.50 · 1.0 GB"
    assert cell(result(4.0), result(3.0)) == "[red]4.00 ms · 0.75 · 1.0 GB[/red]"
    assert cell(result(2.0, 17e9), result(2.0)) == "[red]2.00 ms · 1.00 · 17.0 GB[/red]"
    text = "> 2.00 ms · 1.00 · 1.0 GB · gathers 5 MB"
    assert cell(result(2.0, 1e9, 5_000_000, False), result(2.0)) == text
    unread = {"chip": "v5e", "error": "INTERNAL"}
    assert cell(unread, result(2.0)) == "no estimate"
    assert cell(result(2.0), unread) == "2.00 ms · nan · 1.0 GB"


def test_a_program_that_cannot_be_read_has_no_estimate(monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(tpu_models, "estimated", fail)
    found = tpu_models.measure("v6e", "W8A8", Step(1, 1), Sizes())
    assert found["error"] == "INTERNAL: RET_CHECK failure"
    assert (found["chip"], found["step"]) == ("v6e", "decode 1 x 8192")


def test_chips_without_a_known_memory_raise():
    with pytest.raises(SystemExit, match=r"must be of v5e, v6e; got .*TPU7x"):
        tpu_models.suite(argparse.Namespace(chips=["TPU7x"], only=None))


@pytest.mark.parametrize("scheme", [tpu_models.REFERENCE, "W8A8", "W4A16"])
def test_each_chip_multiplies_its_experts(scheme):
    sizes = Sizes("", 2, 256, 128, 8, 8, 32, 64, experts=16, experts_per_token=2)
    mesh = jax.make_mesh((8,), ("model",), (jax.sharding.AxisType.Explicit,))
    (layers,) = placed(sizes.params(), mesh)["layers"]
    assert layers["experts"]["down"].sharding.spec == jax.P(None, "model")
    assert layers["router"]["kernel"].sharding.spec == jax.P()
    text = tpu_models.lowered(sizes, scheme, Step(2, 1), mesh).as_text()
    dtype = {"W8A8": "i8", "W4A16": "i4"}.get(scheme, "bf16")
    assert f"tensor<2x2x256x128x{dtype}>" in text  # Two of 16 experts, in two layers.
    assert f"tensor<2x16x256x128x{dtype}>" in text


def test_words_choose_models_and_schemes():
    def named(words):
        return [m.name for m in tpu_models._named(tpu_models.MODELS, lambda m: m.name, words)]

    assert named(["Qwen3", "W8A8"]) == ["Qwen3 30B-A3B"]
    assert named(["W8A8"]) == named(None) == ["Llama 3 8B", "Qwen3 30B-A3B"]


def test_steps_are_lowered_for_a_mesh():
    sizes = Sizes(layers=2, width=256, hidden=512, vocabulary=64)
    mesh = jax.make_mesh((8,), ("model",), (jax.sharding.AxisType.Explicit,))
    text = tpu_models.lowered(sizes, "W8A8", Step(2, 1), mesh).as_text()
    assert "xi8>" in text
    names = [str(step) for step in tpu_models.STEPS]
    assert names == ["decode 1 x 8192", "decode 8 x 8192", "decode 64 x 8192", "prefill 4096"]
    assert jnp.bfloat16 == sizes.params()["head"].dtype


@pytest.mark.usefixtures("libtpu")
def test_chips_exchange_only_what_they_add():
    """Each quantizes its part of a row, and rounds its part of a sum, in the kernel."""
    mesh = tpu_models.mesh_of("v5e")
    sizes = Sizes("", 2, 1024, 2048, 8, 8, 128, 1024)
    text = tpu_models.lowered(sizes, "W8A8", Step(8, 1), mesh).compile().as_text() or ""
    body = text[text.index("\n%") : text.index("\nENTRY")]
    assert set(re.findall(r"= (\w+\[[\d,]*\])\S* all-reduce\(", body)) == {"bf16[8,1,1024]"}
    assert set(re.findall(r"/(\w+)/pallas_call", text)) == {"ragged_dot", "append", "attend"}


def test_the_table_of_the_docs_is_that_of_the_results():
    root = pathlib.Path(__file__).parents[2]
    stored = json.loads((root / "benchmarks/results/tpu-models.json").read_text())["models"]
    time = "compiler_estimate_milliseconds"
    for chip, model in dict.fromkeys((r["chip"], r["model"]) for r in stored):
        found = [r for r in stored if (r["chip"], r["model"]) == (chip, model)]
        first = {r["step"]: r.get(time) for r in found if r["contender"] == tpu_models.REFERENCE}

        def cell(r, first=first):
            if "error" in r:
                return "no estimate"
            speed = f" ({first[r['step']] / r[time]:.2f})" if first[r["step"]] else ""
            return f"{r[time]:.2f}{speed}, {r['memory_bytes'] / 1e9:.1f} GB"

        lines = markdown([r | {"column": r["step"].removeprefix("decode ")} for r in found], cell)
        assert "\n".join(lines) in (root / "docs/speed.md").read_text(), (chip, model)
    assert not any(r.get("gathered_bytes") for r in stored)
