"""Every public function and class shows an example in its docstring, and the examples run."""

import pytest

import jaxquant as jq
from jaxquant import methods, training, tree, tuning

from .docstrings import public, run_examples

CASES = public(jq)
CASES |= {f"kv.{n}": getattr(jq.kv, n) for n in ("Cache", "init", "append", "attend")}
for module in (tree, methods, tuning, training):
    short = module.__name__.rsplit(".", 1)[1]
    CASES |= {f"{short}.{name}": v for name, v in public(module).items() if v not in CASES.values()}

# What a method, a transform and a statistic are.
PROTOCOLS = [f"methods.{name}" for name in ("Method", "Statistic", "Transform", "Transformed")]
CASES = {name: value for name, value in CASES.items() if name not in PROTOCOLS}


@pytest.mark.some_rows(16)
@pytest.mark.parametrize("name", CASES)
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples(name, CASES[name])
