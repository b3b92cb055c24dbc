"""Compares tracing a model with tracing it through `jaxquant.lift`.

    python -m benchmarks.lifting

A stack of transformer layers in a Python loop, written with jax.numpy. Each number is the CPU
time of tracing, relative to the function of float arrays.
"""

import gc
import time
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.table

import jaxquant as jq

WIDTH, HIDDEN, HEADS, TOKENS, VOCABULARY = 384, 1536, 12, 16, 1000
LAYERS = (12, 48)
SCHEMES = ("W8A8", "W4A16", "NF4A16")
ROUNDS = 7


def init(layers: int) -> Any:
    """Random parameters."""
    keys = iter(jax.random.split(jax.random.key(0), 6))
    shapes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH)}
    shapes |= {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    layer = {name: jax.random.normal(next(keys), shape) / 20 for name, shape in shapes.items()}
    embed = jax.random.normal(next(keys), (VOCABULARY, WIDTH))
    return {"embed": embed, "layers": [layer] * layers}


def apply(params: Any, tokens: jax.Array) -> jax.Array:
    """Tokens to logits."""
    x = params["embed"][tokens]
    for layer in params["layers"]:
        qkv = jnp.einsum("btd,de->bte", _normalize(x), layer["qkv"])
        query, key, value = qkv.reshape(*x.shape[:2], 3, HEADS, -1).transpose(2, 0, 3, 1, 4)
        weights = jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", query, key))
        mixed = jnp.einsum("bhqk,bhkd->bqhd", weights, value).reshape(x.shape)
        x = x + mixed @ layer["out"]
        x = x + jax.nn.gelu(_normalize(x) @ layer["up"]) @ layer["down"]
    return x @ params["embed"].T


def _normalize(x):
    centered = x - jnp.mean(x, -1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), -1, keepdims=True) + 1e-6)


def tracing_time(fn: Any, *args: Any) -> float:
    """CPU seconds of tracing, with nothing traced before and no garbage collected."""
    jax.clear_caches()
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        jax.jit(fn).trace(*args)
        return time.process_time() - start
    finally:
        gc.enable()


def ratio(params: Any, quantized: Any, tokens: jax.Array) -> float:
    """Least time of the lifted function over that of the float one, measured in turns."""
    lifted = jq.lift(apply)
    rounds = [
        (tracing_time(apply, params, tokens), tracing_time(lifted, quantized, tokens))
        for _ in range(ROUNDS)
    ]
    plain, other = map(min, zip(*rounds, strict=True))
    return other / plain


def main() -> None:
    """Measures all numbers of layers, and prints a table."""
    tokens = jnp.zeros((2, TOKENS), jnp.int32)
    table = rich.table.Table(title="CPU time of tracing, relative to float")
    for column in ("layers", *SCHEMES):
        table.add_column(column, justify="right")
    for layers in LAYERS:
        params = init(layers)
        uses = jq.uses(apply, params, tokens)
        ratios = []
        for name in SCHEMES:
            quantized = jq.tree.quantize(params, uses.rules(jq.SCHEMES[name]))
            ratios.append(ratio(params, quantized, tokens))
        table.add_row(str(layers), *(f"{ratio:.2f}" for ratio in ratios))
    rich.console.Console().print(table)


if __name__ == "__main__":
    main()
