"""Damaged files: each loads, or raises a ValueError that names the file.

    python -m tests.fuzz --reader own --seconds 600 --seed 1

changes files of `tests/tree/data` or `tests/checkpoints/golden`, reads them until the time is
over, and prints how many loaded. The first file that raises something else, or that takes longer
than two seconds, is written to the current folder.
"""

import argparse
import collections
import json
import pathlib
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.checkpoints import open_folder, open_gguf
from jaxquant.tree.internal import DTYPES, MALFORMED

from .checkpoints import test_gguf_mutations as gguf
from .checkpoints.folders import golden_cases, write_folder
from .checkpoints.gguf_files import is_source
from .checkpoints.mutations import mutate_folder, mutated_json
from .tree.parts import joined, parts_of

DATA = pathlib.Path(__file__).parent / "tree" / "data"
FAMILIES = ("bitsandbytes", "compressed_tensors", "float8", "gpt_oss", "mlx")
SECONDS = 2.0
# Yields (path of a damaged file, how it was damaged) again and again.
Files = Iterator[tuple[pathlib.Path, Any]]


class UnexpectedError(Exception):
    """A damaged file was read in a way that it must not be."""


def overwritten(data: bytes, rng: np.random.Generator) -> tuple[bytes, Any]:
    """Bytes with one to three of them replaced, or cut off."""
    if rng.random() < 0.1:
        end = int(rng.integers(len(data)))
        return data[:end], ("cut", end)
    changed = bytearray(data)
    places = [int(i) for i in rng.integers(len(data), size=int(rng.integers(1, 4)))]
    for place in places:
        changed[place] = int(rng.integers(256))
    return bytes(changed), ("bytes", *places)


def forged(data: bytes, rng: np.random.Generator) -> tuple[bytes, Any]:
    """A file of `jaxquant.save` with one or two values changed, and checksums that fit."""
    parts, tensors = parts_of(data)
    part = ("header", "manifest", "contents", "contents")[rng.integers(4)]
    whats = []
    for _ in range(rng.integers(1, 3)):
        if not isinstance(parts[part], dict | list) or not parts[part]:
            break
        parts[part], what = mutated_json(parts[part], rng)
        whats.append((part, *what))
    if rng.random() < 0.3:
        tensors, what = overwritten(tensors, rng) if tensors else (tensors, ())
        whats.append(what)
    _fit_checksums(parts, tensors)
    return joined(parts, tensors), whats


def _fit_checksums(parts: dict[str, Any], data: bytes) -> None:
    """Computes the checksums of tensors again, as far as header and structure are intact."""
    try:
        for name in parts["contents"]["tensors"]:
            fields = parts["header"][name]
            begin, end = fields["data_offsets"]
            dtype = np.dtype(DTYPES[fields["dtype"]]).name
            start = zlib.crc32(f"{dtype}{tuple(fields['shape'])}".encode())
            parts["contents"]["tensors"][name] = zlib.crc32(data[begin:end], start)
    except MALFORMED:
        return


def _own_files(folder: pathlib.Path, rng: np.random.Generator) -> Files:
    whole = [path.read_bytes() for path in sorted(DATA.glob("*.safetensors"))]
    path = folder / "own.safetensors"
    while True:
        change = (forged, forged, forged, overwritten)[rng.integers(4)]
        damaged, what = change(whole[rng.integers(len(whole))], rng)
        path.write_bytes(damaged)
        yield path, what


def _statistics_files(folder: pathlib.Path, rng: np.random.Generator) -> Files:
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((4, 2))}
    rules = [jq.Rule("*", jq.ArrayConfig(format=jq.INT4), axis=0)]

    def run(params: Any, x: jax.Array) -> jax.Array:
        return jq.matmul(x, params["a"]) @ jnp.ones((3, 2)) + jq.matmul(x, params["b"])

    statistics = jq.collect(run, params, [jnp.ones((5, 4))], rules, jq.methods.Importance())
    path = folder / "statistics.safetensors"
    statistics.save(path)
    whole = path.read_bytes()
    while True:
        damaged, what = forged(whole, rng)
        path.write_bytes(damaged)
        yield path, what


def _gguf_files(folder: pathlib.Path, rng: np.random.Generator) -> Files:
    data = gguf.original()
    header = data.index(np.arange(12, dtype=np.float32).tobytes())
    path = folder / "model.gguf"
    while True:
        damaged = gguf.damage(data, header, rng)
        if rng.random() < 0.25:
            damaged = gguf.damage(damaged, header, rng)
        path.write_bytes(damaged)
        yield path, "see gguf.damage"


def _folders(folder: pathlib.Path, rng: np.random.Generator) -> Files:
    cases = [case for family in FAMILIES for case in golden_cases(family)]
    path = folder / "model"
    while True:
        name, config, tensors, _ = cases[rng.integers(len(cases))]
        shutil.rmtree(path, ignore_errors=True)
        yield path, (name, mutate_folder(write_folder(path, config, tensors), rng))


def _read_own(path: pathlib.Path) -> None:
    for read in (jq.load, lambda p: jq.checkpoints.open(p).report(), jq.tree.read_metadata):
        read(path)


def _read_all(checkpoint: Any) -> None:
    for stored in checkpoint.values():
        for array in jax.tree.leaves(stored.value, is_leaf=is_source):
            array.read()


# How files are damaged and read, by the name of a reader.
READERS: dict[str, tuple[Callable[..., Files], Callable[[pathlib.Path], Any]]] = {
    "own": (_own_files, _read_own),
    "statistics": (_statistics_files, jq.Statistics.load),
    "gguf": (_gguf_files, lambda path: _read_all(open_gguf(path))),
    "huggingface": (_folders, lambda path: _read_all(open_folder(path))),
}


def outcome(read: Callable[[pathlib.Path], Any], path: pathlib.Path, what: Any) -> str:
    """ "loaded", or "raised" after a ValueError that names the file.

    Raises:
        UnexpectedError: reading raised another exception, or took too long.
    """
    started = time.process_time()
    try:
        read(path)
        result = "loaded"
    except ValueError as error:
        if str(path) not in str(error):
            raise UnexpectedError(f"{what}: the error does not name the file: {error}") from error
        result = "raised"
    except Exception as error:
        raise UnexpectedError(f"{what}: {type(error).__name__}: {error}") from error
    if time.process_time() - started > SECONDS:
        raise UnexpectedError(f"{what}: reading took {time.process_time() - started:.1f} s")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 after a file that was read in a way that it must not be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reader", choices=READERS, required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    make, read = READERS[options.reader]
    counts = collections.Counter()
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as name:
        for path, what in make(pathlib.Path(name), np.random.default_rng(options.seed)):
            try:
                counts[outcome(read, path, what)] += 1
            except UnexpectedError as error:
                kept = shutil.move(path, f"fuzz-{options.reader}-{path.name}")
                print(f"{error}\nThe file is {kept}, after {dict(counts)}.", file=sys.stderr)
                return 1
            if time.monotonic() > end:
                break
    print(json.dumps({"reader": options.reader, "seed": options.seed, **counts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
