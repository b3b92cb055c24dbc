"""What it costs to take stacked layers one after another in a loop, beside layers that lie apart.

    python -m benchmarks.loops

One row of inputs goes through eight products, by `lax.scan` over stacked weights and by a Python
loop over a list. A number is the time of the scan in units of the list's.
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
SCHEMES |= {name: jq.SCHEMES[name] for name in ("W4A8", "W4A16", "NF4A16", "FP8")}


def apart(x: jax.Array, layers) -> jax.Array:
    """One product after another."""
    for layer in layers:
        x = jq.matmul(x, layer)
    return x


def in_a_loop(x: jax.Array, stacked) -> jax.Array:
    """The same products by a scan."""
    return jax.lax.scan(lambda x, layer: (jq.matmul(x, layer), None), x, stacked)[0]


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
        for kind, run, values in (("apart", apart, layers), ("loop", in_a_loop, stacked)):
            calls[f"{name} {kind}"] = partial(jax.jit(run), x, values)
    times = by_turns(calls, rounds=15)
    found = rich.table.Table("by", "time of a scan, apart = 1", title=f"{LAYERS} layers of {SIZE}")
    for name in SCHEMES:
        found.add_row(name, f"{ratio(times, f'{name} loop', f'{name} apart'):.1f}")
    rich.console.Console().print(found)


if __name__ == "__main__":
    main()
