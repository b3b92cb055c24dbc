"""Prints the lines of a machine's table in jaxquant/explain/speeds.py.

    python -m benchmarks --suite cpu --json cpu.json
    python -m benchmarks.measured cpu.json [--dtype bfloat16]

    python -m benchmarks --suite tpu-compile --json tpu.json
    python -m benchmarks.measured tpu.json --dtype bfloat16 --chip v6e

Speeds are out of cache and relative to the suite's reference. On TPUs they are the compiler's
estimates, which do not exist for Pallas kernels. `jaxquant.explain` says which computation ran, for
the chip or on this machine, so run this where the suite ran. Forced implementations are left out.
"""

import argparse
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

import jaxquant as jq
from jaxquant.explain.machines import machine_for

from . import tpu, tpu_compiler


def explained(
    scheme: jq.Scheme, k: int, n: int, rows: int, dtype: str, machine: str | None
) -> jq.ExplanationRow:
    """What runs for activations (rows, k) by weights (k, n) stored by `tree.quantize`."""
    platform = machine and machine_for(machine).platform
    rule = [jq.Rule("*", scheme, axis=-2)]
    weights = {"kernel": jax.ShapeDtypeStruct((k, n), dtype if machine else jnp.float32)}
    weights = jax.eval_shape(lambda w: jq.tree.quantize(w, rule, platform=platform), weights)
    x = jax.ShapeDtypeStruct((rows, k), dtype)
    (row,) = jq.explain(jq.matmul, x, weights["kernel"], platform=machine)
    return row


def with_speeds(products: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Estimates by the TPU compiler with speeds relative to the first contender.

    Cases that were not compiled or that run a Pallas kernel are left out.
    """

    def key(product):
        return product["chip"], product["K"], product["N"], product["rows"]

    times = {key(p): p[_ESTIMATE] for p in products if p["contender"] == tpu.REFERENCE}
    able = [p for p in products if _ESTIMATE in p and p["kernel_operations"] < p["operations"]]
    return [{**p, "in_cache": False, "speed": times[key(p)] / p[_ESTIMATE]} for p in able]


_ESTIMATE = "compiler_estimate_microseconds"


def lines(products: list[dict[str, Any]], dtype: str, machine: str | None = None) -> list[str]:
    """One line per scheme, computation and shape, as jaxquant/explain/speeds.py reads them."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for product in products:
        is_chosen = product["is_ours"] and product["contender"] in jq.SCHEMES
        is_wanted = is_chosen and not product["in_cache"] and product["dtype"] == dtype
        if not is_wanted or "unsupported" in product:
            continue
        scheme, shape = jq.SCHEMES[product["contender"]], (product["K"], product["N"])
        row = explained(scheme, *shape, product["rows"], dtype, machine)
        inputs = row.formats[0] if scheme.inputs else "float"
        weights = row.formats[1].replace(" per channel", "")
        key = weights, inputs, row.implementation, f"{shape[0]}x{shape[1]}"
        found.setdefault(key, []).append(f"{product['rows']}:{product['speed']:.2f}")
    return [" | ".join((*key, " ".join(speeds))) for key, speeds in sorted(found.items())]


def main() -> None:
    """Reads a file of results and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measured", description=__doc__)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--chip", choices=tpu_compiler.CHIPS, help="of results of tpu-compile")
    arguments = parser.parse_args()
    products, chip = json.loads(arguments.results.read_text())["products"], arguments.chip
    if chip is not None:
        products = with_speeds([p for p in products if p["chip"] == chip])
    print("\n".join(lines(products, arguments.dtype, chip)))


if __name__ == "__main__":
    main()
