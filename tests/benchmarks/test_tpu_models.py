"""How a whole model is divided for the TPU compiler, and what its programs may not gather."""

import argparse
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq
from benchmarks import tpu_models
from benchmarks.tables import markdown
from benchmarks.tpu_models import Sizes, Step, gathered, placed

MESH = jax.sharding.AbstractMesh((8,), ("model",))


def test_the_default_sizes_are_those_of_llama_3_8b():
    shapes = jax.tree.leaves(Sizes().params())
    assert sum(math.prod(x.shape) for x in shapes) == pytest.approx(8.03e9, rel=1e-3)


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


def test_steps_are_lowered_for_a_mesh():
    sizes = Sizes(layers=2, width=256, hidden=512, vocabulary=64)
    mesh = jax.make_mesh((8,), ("model",), (jax.sharding.AxisType.Auto,))
    text = tpu_models.lowered(sizes, "W8A8", Step(2, 1), mesh).as_text()
    assert "xi8>" in text
    names = [str(step) for step in tpu_models.STEPS]
    assert names == ["decode 1 x 8192", "decode 8 x 8192", "decode 64 x 8192", "prefill 4096"]
    assert jnp.bfloat16 == sizes.params()["head"].dtype


def test_the_table_of_the_docs_is_that_of_the_results():
    root = pathlib.Path(__file__).parents[2]
    found = json.loads((root / "benchmarks/results/tpu-models.json").read_text())["models"]
    time = "compiler_estimate_milliseconds"
    first = {r["step"]: r[time] for r in found if r["contender"] == tpu_models.REFERENCE}

    def cell(r):
        return f"{r[time]:.2f} ({first[r['step']] / r[time]:.2f}), {r['memory_bytes'] / 1e9:.1f} GB"

    lines = markdown([r | {"column": r["step"].removeprefix("decode ")} for r in found], cell)
    assert "\n".join(lines) in (root / "docs/speed.md").read_text()
    assert not any(r["gathered_bytes"] for r in found)
