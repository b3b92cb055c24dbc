"""Damaged copies of a folder: odd values in its JSON, and bytes of its file changed or removed."""

import copy
import json

# Replacements for a JSON value.
ODD = [None, True, 3, -1, 0, 2**31, 2**70, 1.5, float("nan"), "x", "\ud800", [], [[]], {}, ["x", 3]]
ODD += [{"a": 1}, [1, 2], [2**40, 2**40], "re:(a+)+$", "../../etc/passwd"]


def places_in(value, place=()):
    """The path of every value in a JSON value."""
    yield place
    if isinstance(value, dict | list):
        children = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in children:
            yield from places_in(child, (*place, key))


def mutated_json(value, rng):
    """A JSON value with one value replaced, removed or renamed; and what was done."""
    value = copy.deepcopy(value)
    places = [p for p in places_in(value) if p]
    *path, key = places[rng.integers(len(places))]
    parent = value
    for step in path:
        parent = parent[step]
    kind = rng.integers(4)
    if kind == 0 and isinstance(parent, dict):
        del parent[key]
        return value, ("removed", *path, key)
    if kind == 1 and isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
        return value, ("renamed", *path, key)
    parent[key] = ODD[rng.integers(len(ODD))]
    return value, (parent[key], *path, key)


def mutate_folder(folder, rng):
    """Changes one file of a folder in place; returns what was done."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    kind = rng.integers(6)
    if kind < 2:
        config, what = mutated_json(json.loads((folder / "config.json").read_text()), rng)
        (folder / "config.json").write_text(json.dumps(config))
        return ("config", *what)
    if kind < 4:
        header, what = mutated_json(json.loads(data[8 : 8 + length]), rng)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        return ("header", *what)
    place = int(rng.integers(8 + length))
    if kind == 4:
        path.write_bytes(data[: int(rng.integers(len(data)))])
        return ("truncated",)
    changed = bytearray(data)
    changed[place] = int(rng.integers(256))
    path.write_bytes(bytes(changed))
    return ("byte", place, data[place], changed[place])
