"""`python -m benchmarks.accuracy.cost`: time and memory of GPTQ over sizes, and what 8B would need.

Each size runs in a separate process, because peak resident memory never falls within one. The
seconds of matrices (N, K) are fitted by a + b K^3 + c N K^2: a Cholesky factor, and the feedback of
each channel to later ones.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import scipy.optimize

import jaxquant as jq
from jaxquant.methods import GPTQ, SecondMoment

# (N, K); the first four are of SmolLM2-135M.
SIZES = ((192, 576), (576, 576), (1536, 576), (576, 1536), (1024, 1024), (2048, 2048), (1024, 3072))
# Of each of the 32 layers of Llama 3 8B: query and output; key and value; gate and up; down.
LLAMA_3_8B = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
LAYERS = 32
_CONFIG = jq.ArrayConfig(format=jq.INT4, group_size=32, scale_dtype="bfloat16")


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", nargs=2, type=int, metavar=("N", "K"), help="measure this alone")
    arguments = parser.parse_args()
    if arguments.size:
        print(*measured(*arguments.size))
        return
    command = [sys.executable, "-m", "benchmarks.accuracy.cost", "--size"]
    found = []
    table = rich.table.Table(title="GPTQ with importance of one matrix, 4.5 bits")
    for name in ("N x K", "seconds", "with compilation", "MiB"):
        table.add_column(name, justify="right")
    for size in SIZES:
        run = subprocess.run(
            [*command, *map(str, size)], capture_output=True, text=True, check=True
        )
        first, seconds, peak = map(float, run.stdout.split()[-3:])
        found.append(seconds)
        table.add_row(f"{size[0]} x {size[1]}", f"{seconds:.2f}", f"{first:.1f}", f"{peak:.0f}")
    console = rich.console.Console()
    console.print(table, estimate(fitted(SIZES, found)))


def measured(rows: int, columns: int) -> tuple[float, float, float]:
    """Seconds of the first call and of the second, and the MiB that they added."""
    random = np.random.default_rng(0)
    weight = jnp.asarray(random.normal(size=(rows, columns)), jnp.float32)
    mixed = random.normal(size=(2 * columns, columns)) @ random.normal(size=(columns, columns))
    moment = SecondMoment.init(columns).update(jnp.asarray(mixed, jnp.float32))
    statistics = {"kernel": {SecondMoment: jax.block_until_ready(moment)}}
    rule = jq.Rule("kernel", _CONFIG, axis=-1, method=GPTQ(importance=True))
    before, seconds = _peak(), []
    for _ in range(2):
        start = time.perf_counter()
        tree = jq.tree.quantize({"kernel": weight}, rule, statistics=statistics)
        jax.block_until_ready(tree)
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1], _peak() - before


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _terms(rows: int, columns: int) -> list[float]:
    return [1.0, columns**3, rows * columns**2]


def fitted(sizes: Sequence[tuple[int, int]], seconds: Sequence[float]) -> np.ndarray:
    """Nonnegative a, b and c with the least relative error."""
    terms = np.array([_terms(*size) for size in sizes]) / np.array(seconds)[:, None]
    unit = terms.max(0)
    return scipy.optimize.nnls(terms / unit, np.ones(len(seconds)))[0] / unit


def estimate(parts: np.ndarray) -> rich.table.Table:
    """What the matrices of Llama 3 8B would need, by the fit."""
    table = rich.table.Table(title="Llama 3 8B, an estimate by the fit", show_footer=True)
    rows, total = [], 0.0
    for (n, k), count in LLAMA_3_8B.items():
        seconds = float(np.dot(_terms(n, k), parts))
        total += LAYERS * count * seconds
        # Weight, its corrected copy, its codes as float32, and two K x K matrices.
        memory = (3 * 4 * n * k + 2 * 4 * k * k) / 2**30
        rows.append((f"{n} x {k}", f"{LAYERS * count}", f"{seconds:.0f}", f"{memory:.1f}"))
    titles = (("N x K", "all"), ("matrices", f"{LAYERS * sum(LLAMA_3_8B.values())}"),
              ("seconds each", f"{total / 3600:.1f} hours"), ("GiB", ""))  # fmt: skip
    for title, footer in titles:
        table.add_column(title, footer, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    main()
