"""Estimates by the TPU compiler for a whole language model, divided among eight chips.

    python -m benchmarks --suite tpu-models [--chips v5e v6e] [--only W8A8 W4A16 Llama Qwen3]

Needs libtpu (extra `tpu`) but no TPU: nothing runs. Llama 3 8B and Qwen3 30B-A3B as shapes, in
bfloat16 and quantized, are tensor-parallel on 2 x 4 chips, under plain `jit` with a mesh of
explicit axes: kernels that read activations are divided along their columns, `out` and `down` along
their rows. Of the 128 experts of Qwen3's layers, each chip has 16, which it multiplies inside
`shard_map`; its keys and values are stored twice, so that each chip has one of 8 heads, and its
norms of queries and keys are left out.
Steps decode one token of 1, 8 or 64 sequences with 8,192 tokens each, or prefill 4,096. Beside
bfloat16 kernels, keys, values and the head are in bfloat16; beside quantized ones, keys and values
are in int8, and the head is in W8A16.

Every figure is an ESTIMATE by the compiler, not a measurement: operations one after another, each
as the longer of its cycles and its bytes, without the time that data takes between chips. Pallas
kernels count as the longest of their bytes, operations and conversions of FP8, and what the
compiler counts for the smallest fusion. Cells:
milliseconds, the speed relative to bfloat16, GB of memory on each chip, and the largest array that
is gathered if it is larger than the activations: weights never should be. Red: slower than
bfloat16, or too large for the chip.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import rich.table
from jax.experimental import topologies

import jaxquant as jq
from jaxquant import demo
from jaxquant.ops import kv

from .tpu_compiler import CHIPS, estimate
from .tpu_text import parse_arrays

T = TypeVar("T")
REFERENCE = "bfloat16"
SCHEMES: Mapping[str, jq.Scheme] = {
    **{name: jq.SCHEMES[name] for name in ("W8A8", "W8A16", "W4A16", "W4A8", "FP8")},
    # As the files of DeepSeek-V3 and Qwen3 have them.
    "FP8 128x128": jq.Scheme(jq.ArrayConfig(format=jq.FP8_E4M3, group_size=(128, 128))),
}
DEVICES = 8
# GB of memory of a chip, by Google's data sheets.
MEMORY = {"v5e": 16, "v6e": 32}
CONTEXT = 8192
# What the compiler's estimate counts for the smallest fusion; it has none for Pallas kernels.
KERNEL_CYCLES = 1830
_COLUMNS, _ROWS = jax.P(None, "model", None), jax.P(None, None, "model")
# Of parameters below these names; the first that is found counts.
_SPECS = {
    "experts": jax.P(None, "model"),
    **dict.fromkeys(("query", "key", "value", "gate", "up"), _COLUMNS),
    **dict.fromkeys(("out", "down"), _ROWS),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """What one program does: `tokens` further tokens of each sequence."""

    sequences: int
    tokens: int

    def __str__(self) -> str:
        if self.tokens > 1:
            return f"prefill {self.tokens}"
        return f"decode {self.sequences} x {CONTEXT}"


STEPS = (Step(1, 1), Step(8, 1), Step(64, 1), Step(1, 4096))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a model of the Llama family; the defaults are those of Llama 3 8B.

    With experts, `hidden` is that of each.
    """

    name: str = "Llama 3 8B"
    layers: int = 32
    width: int = 4096
    hidden: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head: int = 128
    vocabulary: int = 128256
    experts: int = 0
    experts_per_token: int = 0

    @property
    def config(self) -> demo.LlamaConfig:
        """Of the demo's model."""
        return demo.LlamaConfig(
            self.heads, self.kv_heads, self.layers, 1e-5, self.experts_per_token, "model"
        )

    def params(self, dtype: Any = jnp.bfloat16) -> Any:
        """Shapes of the parameters, as `demo.load_llama` has them."""

        def array(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        def kernel(columns: int, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
            return {"kernel": array(self.layers, columns, rows)}

        queries, keys = self.heads * self.head, self.kv_heads * self.head
        layers = {
            "attention_norm": array(self.layers, self.width),
            "mlp_norm": array(self.layers, self.width),
            "query": kernel(queries, self.width),
            "key": kernel(keys, self.width),
            "value": kernel(keys, self.width),
            "out": kernel(self.width, queries),
        }
        if self.experts:
            stack = self.layers, self.experts
            read = array(*stack, self.width, self.hidden)
            experts = {"gate": read, "up": read, "down": array(*stack, self.hidden, self.width)}
            layers |= {"router": kernel(self.experts, self.width), "experts": experts}
        else:
            layers |= {
                "gate": kernel(self.hidden, self.width),
                "up": kernel(self.hidden, self.width),
                "down": kernel(self.width, self.hidden),
            }
        return {
            "embedding": array(self.vocabulary, self.width),
            "head": array(self.vocabulary, self.width),
            "norm": array(self.width),
            "frequencies": jax.ShapeDtypeStruct((self.head // 2,), jnp.float32),
            "layers": [layers],
        }


MODELS = (
    Sizes(),
    Sizes("Qwen3 30B-A3B", 48, 2048, 768, 32, 8, 128, 151936, experts=128, experts_per_token=8),
)


def placed(params: Any, mesh: Any) -> Any:
    """Shapes of the parameters, with how they are divided among the devices of a mesh."""

    def place(path: Any, x: Any) -> Any:
        names = [getattr(key, "key", None) for key in path]
        spec = next((spec for name, spec in _SPECS.items() if name in names), jax.P())
        if names[0] in ("embedding", "head"):
            spec = jax.P("model")
        if not isinstance(x, jq.QTensor):
            return _with(x, mesh, spec)
        specs = jq.specs(x, spec, mesh)
        return jax.tree.map(lambda a, s: _with(a, mesh, s), x, specs)

    return jax.tree_util.tree_map_with_path(place, params, is_leaf=jq.tree.is_quantized)


def _with(x: Any, mesh: Any, spec: jax.P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))


def lowered(sizes: Sizes, scheme: str, step: Step, mesh: Any) -> Any:
    """A step of the model, lowered for the devices of a mesh."""
    params, store = sizes.params(), jnp.bfloat16
    if scheme != REFERENCE:
        found, store = SCHEMES[scheme], jq.ArrayConfig()
        rules = [_rule("layers/*/kernel", found, -1), jq.Rule("head", jq.W8A16, axis=-1)]
        if sizes.experts:
            rules += [_rule("layers/*/experts/*", found, -2)]
            rules = [jq.Rule("layers/*/router/*", None), *rules]
        params = jax.eval_shape(lambda p: jq.tree.quantize(p, rules, platform="tpu"), params)
    length = max(CONTEXT, step.tokens)
    cache = jax.eval_shape(
        lambda: kv.init(
            step.sequences, sizes.kv_heads, length, sizes.head, store=store, layers=sizes.layers
        )
    )
    heads = jax.P(None, None, "model")
    cache = jax.tree.map(lambda x: _with(x, mesh, heads if x.ndim > 2 else jax.P()), cache)
    tokens = jax.ShapeDtypeStruct((step.sequences, step.tokens), jnp.int32)
    tokens = _with(tokens, mesh, jax.P())
    with jax.set_mesh(mesh):
        return demo.next_token.lower(placed(params, mesh), sizes.config, tokens, cache)


def _rule(pattern: str, scheme: jq.Scheme, contracted: int) -> jq.Rule:
    has_blocks = isinstance(scheme.weights.group_size, tuple)
    axis = (-2, -1) if has_blocks else contracted
    return jq.Rule(pattern, scheme, axis=axis, contracted=contracted)


def gathered(text: str, least: int) -> int:
    """Bytes of the largest array that a program gathers, if it has more elements than `least`."""
    lines = re.findall(r"= (.*?) (?:all-gather|all-to-all)(?:-start)?\(", text)
    arrays = [a for line in lines for a in parse_arrays(line) if a.size > least]
    return max((a.bytes for a in arrays), default=0)


def measure(chip: str, scheme: str, step: Step, sizes: Sizes) -> dict[str, Any]:
    """One result: the estimate, or the reason why there is none."""
    about = {"chip": chip, "model": sizes.name, "contender": scheme, "step": str(step)}
    try:
        return about | estimated(chip, scheme, step, sizes)
    except jax.errors.JaxRuntimeError as error:  # libtpu cannot read some of its programs back.
        return about | {"error": str(error)}


def mesh_of(chip: str) -> jax.sharding.Mesh:
    """The chips that a model is divided among."""
    name = CHIPS[chip].topology.replace("2x2", "2x4")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    kinds = (jax.sharding.AxisType.Explicit,)
    return jax.sharding.Mesh(np.array(topology.devices).reshape(DEVICES), ("model",), kinds)


def estimated(chip: str, scheme: str, step: Step, sizes: Sizes) -> dict[str, Any]:
    """The compiler's estimate, memory, and what is gathered."""
    compiled = lowered(sizes, scheme, step, mesh_of(chip)).compile()
    found, memory = estimate(chip, compiled), compiled.memory_analysis()
    calls = 1e6 * found.kernel_runs * KERNEL_CYCLES / CHIPS[chip].clock
    copies = max(sizes.experts_per_token, 1)
    activations = step.sequences * step.tokens * copies * max(sizes.hidden, sizes.width)
    return {
        "compiler_estimate_milliseconds": (found.microseconds + calls) / 1e3,
        "hbm_bytes": found.hbm_bytes,
        "memory_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "gathered_bytes": gathered(compiled.as_text(), activations),
        "is_whole": found.is_whole,
    }


def suite(arguments: Any) -> dict[str, Any]:
    """Runs the suite, prints its tables, and returns what the JSON file holds."""
    chips = arguments.chips or list(MEMORY)
    if not MEMORY.keys() >= set(chips):
        raise SystemExit(f"--chips of tpu-models must be of {', '.join(MEMORY)}; got {chips}.")
    models = _named(MODELS, lambda sizes: sizes.name, arguments.only)
    schemes = [REFERENCE, *_named(tuple(SCHEMES), str, arguments.only)]
    console = rich.console.Console(width=max(120, rich.console.Console().width))
    results = []
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(chips) * len(models) * len(schemes) * len(STEPS))
        for chip, sizes in itertools.product(chips, models):
            part = []
            for scheme, step in itertools.product(schemes, STEPS):
                bar.update(task, description=f"{chip}, {sizes.name}, {scheme}, {step}")
                part.append(measure(chip, scheme, step, sizes))
                bar.advance(task)
            console.print(table(chip, part))
            results += part
    for why in dict.fromkeys(r["error"] for r in results if "error" in r):
        console.print(f"No estimate: {why[:200]}", markup=False)
    return {"is_estimate_of_the_compiler": True, "models": results}


def _named(found: Sequence[T], name: Callable[[T], str], words: list[str] | None) -> Sequence[T]:
    """Those whose names have one of the words; all if none does."""
    return [x for x in found if any(word in name(x) for word in words or ())] or found


def table(chip: str, results: list[dict[str, Any]]) -> rich.table.Table:
    """One line per scheme, one column per step."""
    steps = list(dict.fromkeys(r["step"] for r in results))
    found = rich.table.Table(
        "by", *steps, title=f"{results[0]['model']} on {DEVICES} {chip}, by the compiler's estimate"
    )
    cells = {(r["contender"], r["step"]): r for r in results}
    for name in dict.fromkeys(r["contender"] for r in results):
        found.add_row(name, *(_cell(cells[name, s], cells[REFERENCE, s]) for s in steps))
    return found


def _cell(result: dict[str, Any], reference: dict[str, Any]) -> str:
    if "error" in result:
        return "no estimate"
    time, size = result["compiler_estimate_milliseconds"], result["memory_bytes"] / 1e9
    speed = reference.get("compiler_estimate_milliseconds", math.nan) / time
    text = f"{'' if result['is_whole'] else '> '}{time:.2f} ms · {speed:.2f} · {size:.1f} GB"
    if result["gathered_bytes"]:
        text += f" · gathers {result['gathered_bytes'] / 1e6:.0f} MB"
    is_bad = speed < 1 or size > MEMORY[result["chip"]]
    return f"[red]{text}[/red]" if is_bad else text
