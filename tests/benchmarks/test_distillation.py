"""Distillation of the language model: its rows, and training of a tiny model."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from benchmarks.accuracy.language import LanguageModel
from benchmarks.training import distillation
from benchmarks.training.distillation import QEP, ROWS, Row, Student
from benchmarks.training.finetuning import Data, Size
from jaxquant import demo

from ..demo import llamas

INT2 = "INT2 g32"


def test_rows_are_chosen_by_words_and_not_run_again():
    def names(only, seed=0, found=()):
        rows = distillation.rows_to_run(only, seed, list(found))
        return [(r.scheme, r.name) for r in rows]

    everything = [(r.scheme, r.name) for r in ROWS]
    assert names(None) == everything
    assert names(["INT2"]) == [x for x in everything if x[0] == INT2]
    assert names(["QEP"]) == [x for x in everything if x[1].startswith("QEP")]
    found = [{"scheme": INT2, "contender": "QEP", "seed": 0}]
    assert names(["INT2"], 0, found) == [x for x in names(["INT2"]) if x != (INT2, "QEP")]
    assert names(["INT2"], 1) == [x for x in names(["INT2"]) if "QAT" in x[1]]


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # Optax mixes dtypes.
def test_a_tiny_model_gets_closer_to_itself_by_training(tmp_path):
    llamas.write_gguf(tmp_path / "tiny.gguf", llamas.random_arrays())
    model = demo.load_llama(tmp_path / "tiny.gguf")
    params = jq.tree.dequantize(model.params)
    stack = jax.tree.map(lambda *x: jnp.concatenate(x), *params["layers"])
    params = {**params, "layers": (stack,)}
    rng = np.random.default_rng(0)
    ids = rng.integers(0, params["embedding"].shape[0], 400).astype(np.int32)
    size = Size(tokens=8, held_out=8)
    data = Data(ids, ids[:72].reshape(8, 9))
    tokenizer = types.SimpleNamespace()
    student = Student(LanguageModel(params, model.config, tokenizer), data, size)
    assert student.divergence(params["layers"]) < 1e-6
    rows = Row(INT2), Row(INT2, QEP), Row(INT2, QEP, 3e-3, 12)
    found = {row: student.run(row, 0) for row in rows}
    nearest, qep, trained = (r["divergence"] for r in found.values())
    assert trained < qep < nearest
    assert [r["steps"] for r in found.values()] == [0, 0, 12]
