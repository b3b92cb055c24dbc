"""Compares products with the experts of a mixture: `python -m benchmarks --suite experts`.

Rows are multiplied with the experts that random routing chose for them, in one `ragged_dot`. Cells:
milliseconds, and the speed relative to XLA's float32, by jaxquant's choice and by the computation
of XLA in the same scheme; on CPU, XLA multiplies all rows by all experts.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq

from .tables import markdown
from .timing import by_turns, ratio

# Experts, contracted elements and columns of the gates of Qwen3-30B-A3B, with a quarter of its
# experts; 8 of them per token.
EXPERTS, LENGTH, COLUMNS, PER_TOKEN = 32, 2048, 768, 8
TOKENS = (1, 8, 64)
SCHEMES = {"W8A8": "integer", "W8A16": "dequantize", "W4A8": "dequantize", "W4A16": "dequantize"}
REFERENCE = "float32"


def routed(tokens: int) -> jax.Array:
    """Rows of each expert, when each token chooses some at random."""
    rng = np.random.default_rng(tokens)
    chosen = [rng.permutation(EXPERTS)[:PER_TOKEN] for _ in range(tokens)]
    return jnp.asarray(np.bincount(np.concatenate(chosen), minlength=EXPERTS), jnp.int32)


def suite(_: Any) -> dict[str, Any]:
    """Measures all schemes, prints a table, and returns what the JSON file holds."""
    rng = np.random.default_rng(0)
    floats = jnp.asarray(rng.normal(size=(EXPERTS, LENGTH, COLUMNS)) / LENGTH**0.5, jnp.float32)
    runs: dict[str, tuple[Callable[..., Any], Any]] = {REFERENCE: (jax.lax.ragged_dot, floats)}
    for name, by_xla in SCHEMES.items():
        rule = [jq.Rule("*", jq.SCHEMES[name], axis=1)]
        experts = jq.tree.quantize({"experts": floats}, rule)["experts"]
        runs[name] = jq.ragged_dot, experts
        runs[f"{name} of XLA"] = partial(jq.ragged_dot, implementation=by_xla), experts
    results = []
    for tokens in TOKENS:
        sizes = routed(tokens)
        x = jnp.asarray(rng.normal(size=(tokens * PER_TOKEN, LENGTH)), jnp.float32)
        times = by_turns({n: partial(jax.jit(run), x, w, sizes) for n, (run, w) in runs.items()}, 9)
        for name, taken in times.items():
            results.append(
                {
                    "contender": name,
                    "column": f"{tokens} token{'s' * (tokens > 1)}",
                    "milliseconds": 1e3 * statistics.median(taken),
                    "speed": 1 / ratio(times, name, REFERENCE),
                }
            )
    print(f"{EXPERTS} experts of {LENGTH} x {COLUMNS}, {PER_TOKEN} per token: ms (speed)")
    print("", *table(results), sep="\n")
    return {"experts": results}


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of the table."""
    return markdown(results, lambda r: f"{r['milliseconds']:.2f} ({r['speed']:.1f})")
