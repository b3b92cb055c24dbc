"""Every public function and class shows an example in its docstring, and the examples run."""

import pytest

import jaxquant as jq
from jaxquant import training, tree

from .docstrings import public, run_examples

CASES = public(jq)
CASES |= {f"kv.{n}": getattr(jq.kv, n) for n in ("Cache", "init", "append", "attend")}
for module in (tree, training):
    short = module.__name__.rsplit(".", 1)[1]
    CASES |= {f"{short}.{name}": v for name, v in public(module).items() if v not in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples(name, CASES[name])
