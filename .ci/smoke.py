"""What an installed wheel must do in an environment that has nothing else: run it there.

    python .ci/smoke.py

Fails if the native kernels are missing or inexact, or if a scheme is far from the float product.
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.__main__ import main
from jaxquant.kernels import cpu


def check_kernels() -> None:
    """Each instruction set of this processor multiplies codes exactly."""
    assert cpu.unavailable() is None, cpu.unavailable()
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.randint(keys[0], (3, 96), -127, 128, jnp.int8)
    w = jax.random.randint(keys[1], (40, 96), -127, 128, jnp.int8)
    wanted = np.asarray(x, np.int32) @ np.asarray(w, np.int32).T
    for instructions in cpu.instruction_sets():
        np.testing.assert_array_equal(cpu.int8_dot(x, w, instructions=instructions), wanted)


def check_models(folder: pathlib.Path) -> None:
    """In each scheme, a tree is quantized, saved, loaded and run; a file is inspected."""
    kernel = jax.random.normal(jax.random.key(0), (256, 128))
    x = jax.random.normal(jax.random.key(1), (4, 256))
    exact = x @ kernel
    path = folder / "small.safetensors"
    for name, scheme in jq.SCHEMES.items():
        jq.save(path, jq.tree.quantize({"kernel": kernel}, scheme, platform="cpu"))
        y = jax.jit(jq.matmul)(x, jq.load(path)["kernel"])
        error = float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))
        assert error < 0.2, (name, error)
    assert main(["inspect", str(path)]) == 0


if __name__ == "__main__":
    check_kernels()
    with tempfile.TemporaryDirectory() as folder:
        check_models(pathlib.Path(folder))
    sets = " and ".join(cpu.instruction_sets())
    print(f"jaxquant {jq.__version__} works with JAX {jax.__version__} and kernels for {sets}.")
