"""Compares a loop over stacked layers with a loop over a list of layers.

    python -m benchmarks.loops

One row of activations goes through eight matrix multiplications: by `jax.lax.scan` and
`jaxquant.scan` over stacked weights, and by a Python loop over a list. Each number is the time
relative to the list.
"""

from functools import partial

import jax
import jax.numpy as jnp
import rich.console
import rich.table

import jaxquant as jq

from .timing import by_turns, ratio

SIZE, LAYERS = 2048, 8
SCHEMES = {"float32": None, **{name: jq.SCHEMES[name] for name in ("W8A8", "W8A16")}}
SCANS = {"jax.lax.scan": jax.lax.scan, "jaxquant.scan": jq.scan}
SCHEMES |= {name: jq.SCHEMES[name] for name in ("W4A8", "W4A16", "NF4A16", "FP8")}


def apart(x: jax.Array, layers) -> jax.Array:
    """Multiplies by one layer after another."""
    for layer in layers:
        x = jq.matmul(x, layer)
    return x


def in_a_loop(scan, x: jax.Array, stacked) -> jax.Array:
    """The same multiplications by a scan."""
    return scan(lambda x, layer: (jq.matmul(x, layer), None), x, stacked)[0]


def main() -> None:
    """Measures all schemes, and prints a table."""
    keys = jax.random.split(jax.random.key(0), LAYERS)
    weights = [jax.random.normal(key, (SIZE, SIZE)) / SIZE**0.5 for key in keys]
    x = jnp.ones((1, SIZE))
    calls = {}
    for name, scheme in SCHEMES.items():
        layers = weights
        if scheme is not None:
            rule = [jq.Rule("*", scheme, axis=-2)]
            layers = [jq.tree.quantize({"kernel": w}, rule)["kernel"] for w in weights]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        calls[f"{name} apart"] = partial(jax.jit(apart), x, layers)
        for kind, scan in SCANS.items():
            calls[f"{name} {kind}"] = partial(jax.jit(partial(in_a_loop, scan)), x, stacked)
    times = by_turns(calls, rounds=15)
    title = f"Time of a scan over {LAYERS} layers of {SIZE}, apart = 1"
    found = rich.table.Table("by", *SCANS, title=title)
    for name in SCHEMES:
        ratios = [ratio(times, f"{name} {kind}", f"{name} apart") for kind in SCANS]
        found.add_row(name, *(f"{r:.1f}" for r in ratios))
    rich.console.Console().print(found)


if __name__ == "__main__":
    main()
