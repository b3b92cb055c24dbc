"""Counts the work of the Pallas TPU kernels from what libtpu compiles for them.

    python -m benchmarks.pallas_tpu [--chips v5e v6e] [--shapes attention odd] [--rows 8 512]
    python -m benchmarks.pallas_tpu --experts [--chips v5e v6e] [--rows 8 512]
    python -m benchmarks.pallas_tpu --attention [--chips v5e v6e]
    python -m benchmarks.pallas_tpu --check [--shapes ...] [--rows ...]

No TPU is needed and nothing is timed. For each kernel, in microseconds: "bytes" is the bytes it
moves over the chip's bandwidth; "matrix" is its operations over the bfloat16 rate of the matrix
units; "schedule" is the number of instruction bundles in one step of the kernel's grid, times the
steps, over the clock (an overestimate, because some instructions run only in the first and last
step of a sum). They overlap: the largest one is the kernel's time if nothing else delays it. A
kernel that does not fit VMEM fails to compile and ends the run. Needs the extra `tpu` and
undocumented flags of libtpu.

With --experts, rows are multiplied by 16 experts of 2048 x 768, an eighth of those of a layer of
Qwen3-30B-A3B, all of which have rows. Up to 256 rows, XLA's own computation follows, as the
compiler estimates it: more rows are a loop, whose estimate is not a number of cycles on v5e.

With --attention, one token of each of 8 sequences attends to 8,192 before it: 4 query heads share a
key head of 128, the part of Llama 3 8B that one of 8 chips has, or 8 key heads, all of it. XLA's
own computation follows, as the compiler estimates it. "schedule" is that of a full cache.

With --check, the kernels run every shape in interpret mode, and the largest difference from NumPy
is printed relative to the largest result, or the number of codes and scales that differ.
"""

import argparse
import importlib
import itertools
import math
import os
import pathlib
import re
import tempfile
import unittest.mock
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from jaxquant import FP8_E4M3, INT4, SCHEMES, ArrayConfig, Rule, kv, quantize, ragged_dot, tree
from jaxquant.kernels import pallas_tpu, pallas_tpu_attention, pallas_tpu_experts

from . import tpu_compiler
from .shapes import ROWS, WEIGHTS

# The function has the name of its module.
attention = importlib.import_module("jaxquant.ops.kv.attend")
# Chips that the kernels were written for.
CHIPS = ("v5e", "v6e")
EXPERTS, MOST_ROWS_OF_XLA = (16, 2048, 768), 256
HEADS, SEQUENCES, HEAD, CONTEXT, LAYERS = (1, 8), 8, 128, 8192, 32
PROMPT = 4096
CONFIGS = {
    "g128": ArrayConfig(format=INT4, group_size=128),
    "g32 asymmetric": ArrayConfig(format=INT4, group_size=32, symmetric=False),
    "per column": ArrayConfig(format=INT4),
}


def prepare(folder):
    """Lets libtpu start without a TPU and dump its schedules into a folder."""
    tpu_compiler.prepare()
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    flags = f"{given} --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = flags


def grouped_dot(x, q, interpret=False):
    """The kernel's result, in the dtype of x."""
    run = partial(pallas_tpu.grouped_dot, dtype=x.dtype, interpret=interpret)
    return run(x, q.codes, q.scale, q.zero_point)


def quantized(config, shape):
    """The structure of a quantized weight, or None if groups do not divide it."""
    if config.group_size is not None and shape[0] % config.group_size:
        return None
    return jax.eval_shape(lambda: quantize(jnp.zeros(shape), config))


def count(chip, folder, function, *arguments):
    """(bytes, matrix, schedule) in microseconds, of a function that is one kernel."""
    limits = tpu_compiler.CHIPS[chip]
    eqns = jax.make_jaxpr(function)(*arguments).eqns
    (call,) = (eqn for eqn in eqns if eqn.primitive.name == "pallas_call")
    cost, grid = call.params["cost_estimate"], call.params["grid_mapping"].grid
    for path in folder.iterdir():
        path.unlink()
    tpu_compiler.compile_for(chip, function, *arguments)
    name = call.params["name"]
    (path,) = folder.glob(f"*{name}*schedule-analysis_final_bundles.txt")
    bundles = re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())
    assert bundles is not None, path
    steps = int(bundles[1]) * math.prod(grid)
    times = cost.bytes_accessed / limits.bandwidth, cost.flops / limits.rates["bf16"]
    return tuple(1e6 * t for t in (*times, steps / limits.clock))


def counts(chip, folder, shape, rows):
    """(kernel, time by bytes, by matrix units, by schedule) of each kernel."""
    x = jax.ShapeDtypeStruct((rows, shape[0]), jnp.bfloat16)
    for name, config in CONFIGS.items():
        q = quantized(config, shape)
        if q is not None:
            yield f"grouped_dot, {name}", *count(chip, folder, grouped_dot, x, q)
    yield "quantize_rows", *count(chip, folder, pallas_tpu.quantize_rows, x)


def counts_of_experts(chip, folder, shape, rows):
    """`counts` of products by several matrices."""
    sizes = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    scale = jax.ShapeDtypeStruct((rows, 1), jnp.float32)
    for name, config, inputs in (
        ("int4 g128 by bfloat16", CONFIGS["g128"], jnp.bfloat16),
        ("int4 g128 by int8", CONFIGS["g128"], jnp.int8),
        ("int8 by int8", ArrayConfig(), jnp.int8),
        ("fp8 by bfloat16", ArrayConfig(format=FP8_E4M3), jnp.bfloat16),
    ):
        x = jax.ShapeDtypeStruct((rows, shape[1]), inputs)
        q = jax.eval_shape(lambda config=config: quantize(jnp.zeros(shape), config, 1))
        of_rows = None if inputs == jnp.bfloat16 else scale
        arguments = x, q.codes, q.scale, None, of_rows, sizes
        yield name, *count(chip, folder, pallas_tpu_experts.ragged_dot, *arguments)
    if rows <= MOST_ROWS_OF_XLA:
        yield from estimates_of_xla(chip, shape, rows)


def estimates_of_xla(chip, shape, rows):
    """(computation, "", "", microseconds) of the same products by XLA."""
    x = jax.ShapeDtypeStruct((rows, shape[1]), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    w = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    contenders: dict[str, Any] = {"bfloat16": (jax.lax.ragged_dot, w)}
    for name, by in (("W4A16", "dequantize"), ("W8A8", "integer")):
        rule = Rule("*", SCHEMES[name], axis=1)
        q = jax.eval_shape(lambda w, rule=rule: tree.quantize(w, rule, platform="tpu"), w)
        contenders[name] = partial(ragged_dot, implementation=by), q
    for name, (run, weights) in contenders.items():
        compiled = tpu_compiler.compile_for(chip, run, x, weights, sizes)
        found = tpu_compiler.estimate(chip, compiled)
        yield f"XLA, {name}", "", "", f"{found.microseconds:.1f}"


def counts_of_attention(chip, folder, heads, sequences, tokens=1):
    """`counts` of attention of so many tokens each over one layer of a full cache."""
    query = jax.ShapeDtypeStruct((sequences, tokens, 4 * heads, HEAD), jnp.float32)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    for name, store in (("int8", ArrayConfig()), ("bfloat16", jnp.bfloat16)):
        init = partial(kv.init, sequences, heads, CONTEXT, HEAD, store=store, layers=LAYERS)
        cache = jax.eval_shape(init)
        scales = tuple(x for x in (cache.key_scale, cache.value_scale) if x is not None)
        lengths = jax.ShapeDtypeStruct((LAYERS, sequences), jnp.int32)

        def kernel(query, stored, scales, lengths, layer, dtype=cache.dtype):
            return pallas_tpu_attention.attend(query, stored, scales, dtype, lengths, None, layer)

        given = (cache.keys, cache.values), scales, lengths, layer
        yield name, *count(chip, folder, kernel, query, *given)

        def attend(query, cache, layer):
            return kv.attend(query, cache, layer=layer)

        with unittest.mock.patch.object(attention, "_is_for_tpu", return_value=False):
            compiled = tpu_compiler.compile_for(chip, attend, query, cache, layer)
        found = tpu_compiler.estimate(chip, compiled)
        yield f"XLA, {name}", "", "", f"{found.microseconds:.1f}"


def check(shape, rows):
    """(kernel, largest difference) of each kernel in interpret mode."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, shape[0])), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=shape) + 0.3, jnp.float32)
    for name, config in CONFIGS.items():
        if quantized(config, shape) is not None:
            q = quantize(w, config)
            wanted = np.asarray(x, np.float32) @ np.asarray(q.dequantize())
            got = np.asarray(grouped_dot(x.astype(jnp.float32), q, interpret=True))
            difference = np.abs(got - wanted).max() / np.abs(wanted).max()
            yield f"grouped_dot, {name}", f"{difference:.1e}"
    q = quantize(x, ArrayConfig(), axis=-1)
    codes, scale = pallas_tpu.quantize_rows(x, interpret=True)
    different = np.sum(codes != q.codes) + np.sum(scale != q.scale)
    yield "quantize_rows", f"{different} differ"


def tables(arguments, folder):
    """(title, `counts` or another, its shape, numbers of rows) of each table."""
    if arguments.experts:
        for chip in arguments.chips:
            count_here = partial(counts_of_experts, chip, folder)
            yield f"experts {EXPERTS}, {chip}", count_here, EXPERTS, arguments.rows
    elif arguments.attention:
        for chip, heads in itertools.product(arguments.chips, HEADS):
            count_here = partial(counts_of_attention, chip, folder)
            yield f"attention, {heads} key heads, {chip}", count_here, heads, [SEQUENCES]
            of_prompt = partial(count_here, tokens=PROMPT)
            yield f"attention of {PROMPT} tokens, {heads} key heads, {chip}", of_prompt, heads, [1]
    else:
        places = ("NumPy",) if arguments.check else arguments.chips
        for name, place in itertools.product(arguments.shapes, places):
            found = check if arguments.check else partial(counts, place, folder)
            yield f"{name} {WEIGHTS[name]}, {place}", found, WEIGHTS[name], arguments.rows


def main():
    """Compiles or checks every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=CHIPS)
    parser.add_argument("--shapes", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    what = parser.add_mutually_exclusive_group()
    for name in ("--check", "--experts", "--attention"):
        what.add_argument(name, action="store_true")
    arguments = parser.parse_args()
    columns = ("difference",) if arguments.check else ("bytes", "matrix", "schedule")
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        for title, measure, shape, numbers in tables(arguments, pathlib.Path(folder)):
            table = rich.table.Table("rows", "kernel", *columns, title=title)
            for rows in numbers:
                for kernel, *values in measure(shape, rows):
                    cells = [v if isinstance(v, str) else f"{v:.1f}" for v in values]
                    table.add_row(str(rows), kernel, *cells)
            rich.console.Console(width=100).print(table)


if __name__ == "__main__":
    main()
