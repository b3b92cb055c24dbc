"""Shows how XLA's GPU compiler compiles matrix multiplications for an H200, without a GPU.

    python -m benchmarks.gpu_compiler [--shape up] [--rows 16 4096]

Needs jax[cuda13] or jax[cuda12], but no GPU: nothing runs and nothing is timed. Each cell has the
MB that the program writes to memory in addition to its result, and the formats of its tensor core
instructions, accumulator first. Without a GPU the compiler cannot autotune and uses its defaults.
"""

import argparse
import os
import pathlib
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.table
from jax.experimental import topologies

from . import gpu
from .products import Contender
from .shapes import WEIGHTS

# What the compiler needs to know about a device, as an H200 reports it.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  registers_per_core_limit: 65536
  registers_per_block_limit: 65536  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 151397597184  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


def device() -> Any:
    """An H200 to compile for.

    Raises:
        SystemExit: this JAX cannot compile for GPUs.
    """
    try:
        described = topologies.get_topology_desc(
            "h200", "cuda", target_config=H200, topology="1x1x1"
        )
    except Exception as error:
        raise SystemExit(
            "Compiling for a GPU needs jax[cuda13] or jax[cuda12] on Linux; got "
            f"{type(error).__name__}: {error}."
        ) from error
    return described.devices[0]


def compiled(
    contender: Contender, shape: tuple[int, int], rows: int, sharding: Any, folder: pathlib.Path
) -> str:
    """What one cell says.

    Args:
        contender: in JAX.
        shape: (K, N) of the weights.
        rows: of bfloat16 inputs.
        sharding: where the program is to run.
        folder: where XLA writes the code that it generates.
    """

    def described(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    before = set(folder.glob("*.ptx"))
    w = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    weights = jax.tree.map(described, jax.eval_shape(contender.prepare, w))
    x = described(jax.ShapeDtypeStruct((rows, shape[0]), jnp.bfloat16))
    program = jax.jit(contender.run).lower(x, weights).compile()
    code = "".join(path.read_text() for path in set(folder.glob("*.ptx")) - before)
    memory: Any = program.memory_analysis()
    return f"{memory.temp_size_in_bytes / 1e6:.1f} MB · {', '.join(multiplied(code)) or 'none'}"


def multiplied(code: str) -> list[str]:
    """The formats in a program's matrix instructions, such as "s32 of s8"."""
    found = re.findall(r"mma(?:_async)?\.sync\.aligned\.m\d+n\d+k\d+\.(\S+)", code)
    names = [[part for part in text.split(".") if re.fullmatch(r"\w*\d+", part)] for text in found]
    return sorted({f"{formats[0]} of {formats[1]}" for formats in names})


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_compiler", description=__doc__)
    parser.add_argument("--shape", choices=WEIGHTS, default="up", help="of the weights; up")
    parser.add_argument("--rows", nargs="+", type=int, default=(16, 4096), help="of inputs")
    arguments = parser.parse_args()
    shape = WEIGHTS[arguments.shape]
    with tempfile.TemporaryDirectory() as name:
        # Before the compiler is loaded, which happens with the first device.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={name}"
        sharding = jax.sharding.SingleDeviceSharding(device())
        found = [c for c in gpu.fields()[0] if c.is_ours or c.name == gpu.REFERENCE]
        title = f"{arguments.shape} {shape}, bfloat16 inputs, compiled for an H200"
        table = rich.table.Table("by", *(f"M={m}" for m in arguments.rows), title=title)
        for c in found:
            cells = [compiled(c, shape, m, sharding, pathlib.Path(name)) for m in arguments.rows]
            table.add_row(c.name, *cells)
    rich.console.Console(width=max(100, rich.console.Console().width)).print(table)


if __name__ == "__main__":
    main()
