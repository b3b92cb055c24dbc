"""Files of every version of the format load bit for bit.

`data/` holds what the code of November 2026 saved; the digests are of what it loaded from them. A
new version of the format adds a file, and none is ever changed.
"""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxquant import W8A8, load, tree
from jaxquant.core import LowRank, QTensor
from jaxquant.tree import files
from jaxquant.tree.internal import open_tensors

DATA = Path(__file__).parent / "data"
DIGESTS = {
    "int8": "cad1632badbbff8026d0ad13b4981d8d6bad7e91bdb52f2eddd2b5824da27f54",
    "int4_groups": "17e699e9f539b3d7c9c9d6093c09e2ba6b515efabdd122473dfdf28d33bccce2",
    "codebooks": "b74918933f33df02e6420c50c84f22c817495fb6699520906be119cf4d38befa",
    "inputs": "d650bad1491a441e5dadf0e9659214d99341e4462dab9c0b11a21bfc4e204558",
    "low_rank": "84f899b2820c2d98e4afb0adab11d534ba3b619ec8d6501596d9cd73fdf8e1ef",
    "containers": "a3f1b337b4b5410555c28927eab331019d144addb416acfe4a4afc53746edf05",
    "offset_permutation": "8ca604a22fb5496225cd70a5057840ec613797f3c8a6cb5b7c6e073fc620bdb2",
    "rotation": "a8e30cce6ab79d091557604af463f3cc783005d908aeb3bf75c83ac6510794fb",
    "dense_bits": "f669b390d39e3a100d650af28f0e5ed6095e3747928da9349f648fbb8a04fe19",
    "low_rank_norms": "0755cf5bb9a85300d8df8a5e0ae26bfe68f70738e95ce232470e62fe68c3ed81",
}
# The version of the files; 1 of all that are not named.
VERSIONS = {"offset_permutation": 2, "rotation": 3, "dense_bits": 4, "low_rank_norms": 5}


def leaves_of(params, path=""):
    """Leaves by path, sorted by text: keys may be both int and str."""
    if isinstance(params, dict):
        for key in sorted(params, key=lambda k: (isinstance(k, str), k)):
            yield from leaves_of(params[key], f"{path}/{key!r}")
    elif isinstance(params, list | tuple):
        for i, value in enumerate(params):
            yield from leaves_of(value, f"{path}/{type(params).__name__}{i}")
    else:
        yield path, params


def static_of(leaf):
    """Static fields of a QTensor, including those of its nested scales."""
    if isinstance(leaf, LowRank):
        return [leaf.alpha, leaf.config.format.name, leaf.config.group_size, *static_of(leaf.base)]
    if not isinstance(leaf, QTensor):
        return []
    config = leaf.inputs and leaf.inputs.config
    inputs = [config.format.name, config.group_size, repr(config.range)] if config else []
    if leaf.inputs is not None and leaf.inputs.rotation is not None:
        inputs.append(leaf.inputs.rotation.block)
    return [leaf.format.name, np.dtype(leaf.dtype).name, leaf.order, *inputs, static_of(leaf.scale)]


def digest(params):
    """A hash of all paths, static fields, dtypes, shapes and bits."""
    found = hashlib.sha256()
    for path, leaf in leaves_of(params):
        found.update(f"{path} {static_of(leaf)}".encode())
        for x in jax.tree.leaves(leaf):
            is_array = hasattr(x, "dtype")
            text = f"{x.dtype.name}{x.shape}" if is_array else repr(x)
            found.update(text.encode() + (np.asarray(x).tobytes() if is_array else b""))
    return found.hexdigest()


@pytest.mark.parametrize("name", DIGESTS)
def test_an_old_file_loads_bit_for_bit(name):
    path = DATA / f"{name}.safetensors"
    assert digest(load(path)) == DIGESTS[name]
    assert tree.read_metadata(path) == {"note": name}
    with open_tensors(path) as file:
        manifest = json.loads(file.metadata["jaxquant"])
    assert manifest["version"] == VERSIONS.get(name, 1)


def test_every_old_file_is_tested():
    assert {p.stem for p in DATA.glob("*.safetensors")} == set(DIGESTS)


def test_every_version_has_a_file():
    assert {1, *VERSIONS.values()} == set(range(1, files.VERSION + 1))


def test_the_inputs_of_an_old_file_are_read():
    found = load(DATA / "inputs.safetensors")
    assert found["dynamic"].inputs.config == W8A8.inputs
    assert float(found["static"].inputs.scale) == np.float32(0.1)
    assert int(found["static"].inputs.zero_point) == 3
    np.testing.assert_array_equal(found["multiplier"].inputs.multiplier, np.arange(64.0))
