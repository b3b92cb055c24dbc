"""Damaged folders raise a ValueError that names the file, or give the same values.

JAXQUANT_MUTATIONS=10000 tries that many damaged copies of each family instead of a few.
"""

import json
import os
import shutil

import numpy as np
import pytest

from jaxquant import QTensor
from jaxquant.checkpoints import open_folder

from .folders import golden_cases, write_file, write_folder
from .models import made_cases
from .mutations import mutate_folder, mutated_json

COUNT = int(os.environ.get("JAXQUANT_MUTATIONS", "60"))
GOLDEN = ["compressed_tensors", "float8", "gpt_oss", "bitsandbytes", "mlx"]
MADE = ["awq", "gptq", "modelopt"]


def arrays_of(path):
    """By name, the format of each tensor and all arrays that its values depend on."""
    found = {}
    for name, stored in open_folder(path).items():
        leaves = [x.read() for x in sources_in(stored.value)]
        found[name] = (str(getattr(stored.value, "format", None)), leaves)
    return found


def arrays_or_error(path):
    try:
        return arrays_of(path), ""
    except ValueError as error:
        return {}, str(error)


def sources_in(value):
    if isinstance(value, QTensor):
        order = value.inputs and value.inputs.permutation
        for part in (value.codes, value.scale, value.zero_point, value.offset, order):
            yield from sources_in(part)
    elif value is not None:
        yield value


def is_same(a, b):
    return (
        a[0] == b[0]
        and len(a[1]) == len(b[1])
        and all(np.array_equal(x, y) for x, y in zip(a[1], b[1], strict=True))
    )


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("family", [*GOLDEN, *MADE])
def test_damaged_folders(family, tmp_path):
    rng = np.random.default_rng(0)
    cases = list(golden_cases(family) if family in GOLDEN else made_cases(family))
    folder = tmp_path / "model"
    intact = {}
    for case, config, tensors, _ in cases:
        intact[case] = arrays_of(write_folder(folder, config, tensors))
    errors = 0
    for i in range(COUNT):
        case, config, tensors, _ = cases[i % len(cases)]
        shutil.rmtree(folder)
        change = mutate_folder(write_folder(folder, config, tensors), rng)
        found, error = arrays_or_error(folder)
        assert str(folder) in error or found, (case, change, error)
        errors += not found
        for name, arrays in found.items():
            if name in intact[case]:
                assert is_same(arrays, intact[case][name]), (case, change, name)
            else:
                # An array that is not needed got another name.
                assert any(np.array_equal(arrays[1][0], x) for x in tensors.values()), change
    assert COUNT / 2 < errors < COUNT, errors


def test_damaged_indices(tmp_path):
    rng = np.random.default_rng(0)
    _, config, tensors, _ = next(golden_cases("compressed_tensors"))
    folder = write_folder(tmp_path / "model", config, tensors)
    (folder / "model.safetensors").unlink()
    halves = list(tensors)[:2], list(tensors)[2:]
    for i, names in enumerate(halves):
        write_file(folder / f"{i}.safetensors", {name: tensors[name] for name in names})
    places = {name: f"{i}.safetensors" for i, names in enumerate(halves) for name in names}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    intact = arrays_of(folder)
    for _ in range(COUNT):
        changed, change = mutated_json(index, rng)
        path.write_text(json.dumps(changed))
        found, error = arrays_or_error(folder)
        assert str(folder) in error or found, (change, error)
        for name, arrays in found.items():
            assert is_same(arrays, intact[name]), (change, name)
