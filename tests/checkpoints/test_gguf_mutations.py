"""Damaged GGUF files raise a ValueError with their name, or give what is still intact.

JAXQUANT_MUTATIONS is the number of files; 10,000 have been run.
"""

import os
import struct
import time
import tracemalloc

import jax
import numpy as np
import pytest

from jaxquant.checkpoints import open_gguf

from .gguf_files import ARRAY, BOOL, FLOAT32, STRING, UINT32, gguf, is_source
from .gguf_files import array as float_tensor
from .gguf_files import blocks as golden_tensor

COUNT = int(os.environ.get("JAXQUANT_MUTATIONS", "100"))
SECONDS, ALLOCATED = 2.0, 20_000_000
# What damaged counts, lengths, offsets and type codes look like.
NUMBERS = [0, 1, 2, 7, 8, 9, 31, 33, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
NUMBERS += [2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]


def original():
    pairs = [
        ("general.architecture", STRING, "llama"),
        ("general.alignment", UINT32, 32),
        ("llama.attention.head_count", UINT32, 2),
        ("llama.rope.freq_base", FLOAT32, 1e4),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "bc", "", "ü"])),
        ("tokenizer.ggml.token_type", ARRAY, (UINT32, [1, 3, 2, 1])),
        ("tokenizer.ggml.add_bos_token", BOOL, 1),
    ]
    tensors = [float_tensor("token_embd.weight", np.arange(12).reshape(3, 4))]
    for name in ("Q4_0", "Q4_K", "IQ2_XS", "MXFP4", "NVFP4"):
        tensors += [golden_tensor(f"blk.0.{name.lower()}.weight", name)[0]]
    tensors += [golden_tensor("blk.0.attn_q.weight", "Q8_0", rows=4)[0]]
    tensors += [
        float_tensor("blk.0.nvfp4.scale", [0.5]),
        float_tensor("output_norm.weight", [1, 2]),
    ]
    return gguf(pairs, tensors)


def overwrite(data, place, new):
    return data[:place] + new + data[place + len(new) :]


def damage(data, header, rng):
    """The file with one kind of damage, mostly in its header."""
    end = header if rng.random() < 0.8 else len(data)
    place, other = (int(rng.integers(0, max(1, min(e, len(data))))) for e in (end, len(data)))
    number, length = NUMBERS[rng.integers(len(NUMBERS))], int(rng.integers(1, 65))
    flip, byte = 1 << int(rng.integers(8)), int(rng.integers(256))
    choices = [
        *[lambda: overwrite(data, place, bytes([data[place] ^ flip]))] * 4,
        *[lambda: overwrite(data, place, bytes([byte]))] * 2,
        lambda: overwrite(data, place, struct.pack("<Q", number)),
        lambda: overwrite(data, place, struct.pack("<I", number % 2**32)),
        lambda: overwrite(data, place, data[other : other + length]),
        lambda: data[:place] + data[place + length :],
        lambda: data[:place] + rng.bytes(length) + data[place:],
        lambda: data[:other] + data[:length],
        lambda: data[:other],
    ]
    return choices[rng.integers(len(choices))]() or b"\0"


def contents(checkpoint):
    """What is said about each tensor, and all of its arrays as bytes."""

    def arrays(value):
        return [(a.shape, a.read().tobytes()) for a in jax.tree.leaves(value, is_leaf=is_source)]

    return {n: ((s.kind, s.shape, s.nbytes), arrays(s.value)) for n, s in checkpoint.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("mutations") / "a.gguf"
    data = original()
    path.write_bytes(data)
    return path, data, contents(open_gguf(path))


def opened(path, names):
    """The contents of the file, or None if that is an error that names it."""
    try:
        return contents(open_gguf(path, names))
    except ValueError as error:
        message = str(error)
    assert str(path) in message
    return None


def test_damaged_files_are_errors_or_give_the_same_values(base):
    path, data, wanted = base
    header = data.index(np.arange(12, dtype=np.float32).tobytes())
    rng = np.random.default_rng(COUNT)
    count = same = 0
    slowest = 0.0
    tracemalloc.start()
    for i in range(COUNT):
        damaged = damage(data, header, rng)
        if i % 4 == 0:
            damaged = damage(damaged, header, rng)
        path.write_bytes(damaged)
        started = time.perf_counter()
        found, _ = opened(path, "stored"), opened(path, "huggingface")
        slowest = max(slowest, time.perf_counter() - started)
        count += found is not None
        # If only the header is damaged, tensors that look the same are the same.
        found = found if found and damaged[header:] == data[header:] else {}
        for name in found.keys() & wanted.keys():
            if found[name][0] == wanted[name][0]:
                same += 1
                assert found[name] == wanted[name], (i, name)
    allocated = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(
        f"{COUNT} files: {count} opened, {same} of their tensors compared, {slowest:.2f} s for one"
    )
    assert allocated < ALLOCATED
    assert slowest < SECONDS
    assert COUNT / 20 < count < COUNT / 2
    assert same > COUNT / 4
