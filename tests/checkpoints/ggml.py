"""ggml's own C functions, from the package `xllamacpp`, as the reference for blocks.

    python -m tests.checkpoints.ggml

writes tests/checkpoints/golden/gguf.npz: for each type, random blocks and the values that ggml
decodes them to. The package is not needed to run the tests that read this file.
"""

import pathlib

import numpy as np

from benchmarks.accuracy.ggml import library

GOLDEN = pathlib.Path(__file__).parent / "golden" / "gguf.npz"
# Each type that files may have, by its code.
NAMES = {
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
    42: "Q2_0",
}
MXFP4, NVFP4 = 39, 40


def decode(lib, number, blocks):
    """Values of blocks, uint8 (n, bytes) -> float32 (n, elements)."""
    traits = lib.ggml_get_type_traits(number).contents
    blocks = np.ascontiguousarray(blocks)
    assert blocks.shape[1] == traits.nbytes
    values = np.empty((len(blocks), traits.elements), np.float32)
    traits.to_float(blocks.ctypes.data, values.ctypes.data, values.size)
    return values


def random_blocks(lib, number, count, seed=0):
    """Blocks of random bytes whose values are finite. The first block is zero."""
    nbytes = lib.ggml_get_type_traits(number).contents.nbytes
    rng = np.random.default_rng([number, seed])
    blocks = rng.integers(0, 256, (2 * count + 16, nbytes), np.uint8)
    blocks[0] = 0
    if number == MXFP4:
        blocks[:, 0] = blocks[:, 0] % 200 + 20  # Elsewhere, values are subnormal or infinite.
    if number == NVFP4:
        blocks[:, :4][blocks[:, :4] == 255] = 0  # Not a number of e4m3; ggml decodes it to 480.
    blocks = blocks[np.isfinite(decode(lib, number, blocks)).all(1)]
    return blocks[:count]


def main():
    """Writes the golden file."""
    lib, arrays = library(), {}
    for number, name in NAMES.items():
        traits = lib.ggml_get_type_traits(number).contents
        assert traits.name.decode().upper() == name, (traits.name, name)
        blocks = random_blocks(lib, number, max(4, 512 // traits.elements))
        arrays[f"{name}.number"] = number
        arrays[f"{name}.blocks"] = blocks
        arrays[f"{name}.values"] = decode(lib, number, blocks)
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    main()
