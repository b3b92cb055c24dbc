"""Every public name has a complete type, as far as other packages have them.

JAX does not declare all of `jax.Array`, nor Keras anything, hence `--ignoreexternal`.
"""

import json
import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_every_public_name_has_a_complete_type():
    command = ["pyright", "--verifytypes", "jaxquant", "--ignoreexternal", "--outputjson"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    symbols = json.loads(done.stdout)["typeCompleteness"]["symbols"]
    exported = [symbol for symbol in symbols if symbol["isExported"]]
    assert len(exported) > 4000
    assert [s["name"] for s in exported if not s["isTypeKnown"]] == []
