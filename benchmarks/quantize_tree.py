"""Prints how long `tree.quantize` takes on the demo's encoder, and how much memory.

    python -m benchmarks.quantize_tree

Each scheme runs in a process of its own. Time and memory are those of a second call, after
compilation: memory is the growth of the process from before the call to its peak, in units of the
float32 weights, which count as 1. Needs Linux and the extra `demo`.
"""

import gc
import json
import pathlib
import re
import subprocess
import sys
import time

import jax

from jaxquant import demo, tree


def _memory(field: str) -> int:
    """VmRSS, the bytes in memory, or VmHWM, their peak since it was last reset. Linux only."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"{field}:\s+(\d+) kB", status)[0])


def measure(name: str) -> dict[str, float]:
    """Seconds of the second call, and the peak of memory in units of the weights."""
    params, _ = demo.load_encoder(demo.packaged_encoder())
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    rules = tree.default_rules(demo.SCHEMES[name], axis=-1)
    jax.block_until_ready(tree.quantize(params, rules))
    gc.collect()
    before = _memory("VmRSS")
    # Resets VmHWM, which loading the file has raised.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    quantized = jax.block_until_ready(tree.quantize(params, rules))
    seconds = time.perf_counter() - start
    del quantized
    return {"seconds": seconds, "peak": 1 + (_memory("VmHWM") - before) / weights}


def main():
    """Runs every scheme of the demo."""
    print("| scheme | seconds | peak memory, weights = 1 |\n|---|---|---|")
    for name in demo.SCHEMES:
        command = [sys.executable, "-m", "benchmarks.quantize_tree", name]
        result = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        print(f"| {name} | {result['seconds']:.2f} | {result['peak']:.2f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
