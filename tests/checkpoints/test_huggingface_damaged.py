"""Damaged folders raise a ValueError that names the file, or give the same values.

JAXQUANT_MUTATIONS=10000 tries that many damaged copies of each family instead of a few.
"""

import os
import shutil

import numpy as np
import pytest

from jaxquant import QTensor
from jaxquant.checkpoints import open_folder

from .folders import golden_cases, write_folder
from .mutations import mutate_folder

COUNT = int(os.environ.get("JAXQUANT_MUTATIONS", "60"))
FAMILIES = ["compressed_tensors"]


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


@pytest.mark.parametrize("family", FAMILIES)
def test_damaged_folders(family, tmp_path):
    rng = np.random.default_rng(0)
    cases = list(golden_cases(family))
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
            # A plain array may have got another name.
            is_renamed = name not in intact[case] and len(arrays[1]) == 1
            wanted = intact[case].values() if is_renamed else [intact[case][name]]
            assert any(is_same(arrays, w) for w in wanted), (case, change, name)
    assert COUNT / 2 < errors < COUNT, errors
