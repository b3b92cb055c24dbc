"""Checksums of the entries of one layer in an HDF5 file.

They are stored in an attribute of the layer's group, which stock Keras ignores.
"""

import json
import zlib
from typing import Any

import numpy as np

from .. import compat

ATTRIBUTE = "crc32"


def write_checksums(store: Any) -> None:
    """Adds the checksums of the entries that a layer has written so far."""
    attributes = compat.store_attributes(store)
    if attributes is not None:
        attributes[ATTRIBUTE] = json.dumps({key: _crc32(store[key]) for key in list(store.keys())})


def read_entries(name: str, store: Any) -> dict[str, np.ndarray]:
    """Reads all entries of the layer `name` and verifies their checksums.

    Raises:
        ValueError: an entry does not have the checksum that the file states.
    """
    entries = {key: np.asarray(store[key]) for key in list(store.keys())}
    expected = _expected(name, store)
    wrong = [key for key in expected if key not in entries or _crc32(entries[key]) != expected[key]]
    if wrong:
        raise ValueError(
            f"The file's entries {wrong} of layer {name!r} do not have the checksums that were "
            "saved with them. It is damaged, or was changed: save the model again."
        )
    return entries


def _expected(name, store):
    """The checksums in the file by entry; empty for other versions and stock Keras."""
    text = (compat.store_attributes(store) or {}).get(ATTRIBUTE, "{}")
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The file's attribute {ATTRIBUTE!r} of layer {name!r} must be a JSON object; got "
            f"{str(text)[:60]!r}. It is damaged: save the model again."
        ) from error


def _crc32(entry):
    entry = np.asarray(entry)
    return zlib.crc32(entry.tobytes(), zlib.crc32(f"{entry.dtype}{entry.shape}".encode()))
