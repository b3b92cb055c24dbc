"""Memory and time of quantizing a checkpoint that does not have to fit in memory.

    python -m benchmarks.streaming --gib 6 --folder /some/disk

Makes a folder of bfloat16 shards with the shapes of a language model (random values), quantizes it
to W4A16 into a file, and prints the peak resident memory of each way, measured in new processes:
on one device, on 8 simulated devices, and in two processes of `jax.distributed` on this machine.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxquant as jq

# Shapes of Llama 3.2 3B, whose bfloat16 files take 6 GiB.
HIDDEN, MLP, KV, VOCABULARY = 3072, 8192, 1024, 128256
WAYS = ("one device", "8 devices", "2 processes of 4 devices")


def shapes(layer: int) -> dict[str, tuple[int, ...]]:
    """Tensors of one layer, named as in Hugging Face's Llama."""
    prefix = f"model.layers.{layer}"
    return {
        f"{prefix}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}.self_attn.k_proj.weight": (KV, HIDDEN),
        f"{prefix}.self_attn.v_proj.weight": (KV, HIDDEN),
        f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}.mlp.gate_proj.weight": (MLP, HIDDEN),
        f"{prefix}.mlp.up_proj.weight": (MLP, HIDDEN),
        f"{prefix}.mlp.down_proj.weight": (HIDDEN, MLP),
        f"{prefix}.input_layernorm.weight": (HIDDEN,),
        f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
    }


def make(folder: Path, gib: float) -> int:
    """Writes shards of random bfloat16 until they have so many GiB; returns their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    random, total, weight_map = np.random.default_rng(0), 0, {}
    # Normal values in bfloat16, repeated: making 6 GiB of different ones would take minutes.
    values = random.standard_normal(2**22, np.float32).view(np.uint32)
    block = (values >> 16).astype(np.uint16)
    files: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}]
    layer = 0
    while total + sum(2 * np.prod(s) for f in files[-1:] for s in f.values()) < gib * 2**30:
        total += sum(2 * int(np.prod(s)) for s in files[-1].values())
        files.append(shapes(layer))
        layer += 1
    total += sum(2 * int(np.prod(s)) for s in files[-1].values())
    for i, tensors in enumerate(files):
        name = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        weight_map |= dict.fromkeys(tensors, name)
        _write(folder / name, tensors, block)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return total


def _write(path: Path, tensors: dict[str, tuple[int, ...]], block: np.ndarray) -> None:
    header, stop = {}, 0
    for name, shape in tensors.items():
        start, stop = stop, stop + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for left in range(stop // 2, 0, -block.size):
            file.write(block[: min(left, block.size)].tobytes())


def quantize(source: Path, target: Path, way: str, process: int, address: str) -> None:
    """Quantizes the folder in this process and prints what it took, as JSON."""
    sharding: Any = None
    if way != WAYS[0]:
        jax.config.update("jax_num_cpu_devices", 8 if way == WAYS[1] else 4)
    if way == WAYS[2]:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, 2, process)
    if way != WAYS[0]:
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((8,), ("model",), axis_types=auto)
        rows, whole = (jax.NamedSharding(mesh, jax.P(*names)) for names in (("model",), ()))
        sharding = lambda name, shape: rows if len(shape) == 2 else whole  # noqa: E731

    start = time.perf_counter()
    report = jq.checkpoints.write_quantized(
        target, jq.checkpoints.open(source), jq.W4A16, sharding=sharding
    )
    found = {
        "seconds": time.perf_counter() - start,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bits": report.total.bits_per_weight,
    }
    print(json.dumps(found), flush=True)


def run(source: Path, target: Path, way: str) -> list[dict[str, float]]:
    """What each process of one way took."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    count = 2 if way == WAYS[2] else 1
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.streaming", "--run", way, "--process", str(i),
             "--address", address, "--folder", str(source), "--target", str(target)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for i in range(count)
    ]  # fmt: skip
    outputs = [p.communicate()[0] for p in processes]
    if any(p.returncode for p in processes):
        raise RuntimeError(f"{way}: a process failed, see above.")
    return [json.loads(text.splitlines()[-1]) for text in outputs]


def main() -> None:
    """Makes the folder, quantizes it in each way, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=6)
    parser.add_argument("--folder", type=Path, default=Path("streaming"))
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        quantize(options.folder, options.target, options.run, options.process, options.address)
        return
    source, target = options.folder / "model", options.folder / "small.safetensors"
    total, first = make(source, options.gib), None
    print(f"{total / 2**30:.2f} GiB of bfloat16, {os.cpu_count()} cores")
    print(f"{'':26}{'peak MiB':>12}{'seconds':>10}{'bits per weight':>18}  same bytes")
    try:
        for way in WAYS:
            found = run(source, target, way)
            digest = _digest(target)
            first = first or digest
            peak = " + ".join(f"{f['peak'] / 2**20:.0f}" for f in found)
            seconds = max(f["seconds"] for f in found)
            print(f"{way:26}{peak:>12}{seconds:10.1f}{found[0]['bits']:18.2f}  {digest == first}")
    finally:
        shutil.rmtree(options.folder)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
