"""Every public name has a complete type, as far as other packages have them."""

import json
import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_every_public_name_has_a_complete_type():
    pytest.importorskip("keras")
    command = ["pyright", "--verifytypes", "jaxquant", "--ignoreexternal", "--outputjson"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    symbols = json.loads(done.stdout)["typeCompleteness"]["symbols"]
    exported = [symbol for symbol in symbols if symbol["isExported"]]
    assert len(exported) > 3000
    incomplete = {s["name"] for s in exported if not s["isTypeKnown"]}
    # Keras does not say the types of its classes, hence of those that inherit from them.
    untyped = {name for name in incomplete if name.startswith("jaxquant.keras.")}
    assert len(untyped) < 50
    assert incomplete == untyped
