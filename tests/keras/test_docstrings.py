"""Every public name of `jaxquant.keras` shows an example in its docstring, which runs."""

import keras
import pytest

import jaxquant.keras as jk

from ..docstrings import public, run_examples

CASES = public(jk)
# What examples need beside Keras.
LIBRARIES = {"load_preset": "keras_hub"}


@pytest.mark.some_rows(16)
@pytest.mark.parametrize("name", CASES)
def test_the_example_runs(name, tmp_path, monkeypatch):
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name], reason="pip install --no-deps keras-hub")
    monkeypatch.chdir(tmp_path)
    run_examples(name, CASES[name], jk=jk, keras=keras)
