"""Prints the lines of a machine's table in jaxquant/ops/measured.py.

    python -m benchmarks --suite cpu --json cpu.json
    python -m benchmarks.measured cpu.json [--dtype bfloat16]

Speeds are those out of cache, in units of the suite's reference. Which computation ran is what
`jaxquant.explain` says on this machine: run it where the suite ran. Forced ones are left out.
"""

import argparse
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

import jaxquant as jq


def explained(scheme: jq.Scheme, k: int, n: int, rows: int, dtype: str) -> jq.ExplanationRow:
    """What runs for inputs of (rows, k) by weights of (k, n) that `tree.quantize` stored."""
    rule = [jq.Rule("*", scheme, axis=-2)]
    weights = {"kernel": jax.ShapeDtypeStruct((k, n), jnp.float32)}
    weights = jax.eval_shape(lambda w: jq.tree.quantize(w, rule), weights)
    (row,) = jq.explain(jq.matmul, jax.ShapeDtypeStruct((rows, k), dtype), weights["kernel"])
    return row


def lines(products: list[dict[str, Any]], dtype: str) -> list[str]:
    """One line per scheme, computation and shape, as jaxquant/ops/measured.py reads them."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for product in products:
        is_chosen = product["is_ours"] and product["contender"] in jq.SCHEMES
        is_wanted = is_chosen and not product["in_cache"] and product["dtype"] == dtype
        if not is_wanted or "refusal" in product:
            continue
        scheme, shape = jq.SCHEMES[product["contender"]], (product["K"], product["N"])
        row = explained(scheme, *shape, product["rows"], dtype)
        inputs = row.formats[0] if scheme.inputs else "float"
        weights = row.formats[1].replace(" per channel", "")
        key = weights, inputs, row.implementation, f"{shape[0]}x{shape[1]}"
        found.setdefault(key, []).append(f"{product['rows']}:{product['speed']:.2f}")
    return [" | ".join((*key, " ".join(speeds))) for key, speeds in sorted(found.items())]


def main() -> None:
    """Reads a file of results, and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measured", description=__doc__)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    print("\n".join(lines(results["products"], arguments.dtype)))


if __name__ == "__main__":
    main()
