"""Quantization-aware training of SmolLM2 against its own logits in float32 (distillation).

    python -m benchmarks --suite training --parts distillation [--only QEP] [--seeds 1]

The loss is the Kullback-Leibler divergence of the next token from that of the float model, the
dithered one of `accuracy.language`, on Python's documentation. Kernels are quantized; embedding and
head, which are one matrix, stay in float. With `--json`, rows are added to the file as they finish.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console

import jaxquant as jq
from jaxquant import demo, training
from jaxquant.methods import GPTQ

from ..accuracy import language
from .finetuning import Data, Size, read_data
from .loop import Result
from .qat import optimizer_for
from .saved import rows_in, save_rows

NEAREST, QEP = "nearest", "QEP"
SCHEMES = {
    # Codes of a symmetric range, whose grid LSQ can start from.
    "W4A8": jq.Scheme(jq.ArrayConfig(format=jq.INT4, value_range=(-7, 7)), jq.W4A8.inputs),
    "INT2 g32": jq.Scheme(jq.ArrayConfig(format=jq.INT2, group_size=32, symmetric=False)),
}
# Of short windows, so that a step takes seconds on two cores.
SIZE = Size(tokens=64, held_out=16)
BATCH, CALIBRATED = 4, 32


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        scheme: name of the scheme.
        start: whether codes are rounded to nearest, or layer by layer (QEP), whose grid is trained
            too (LSQ).
        rate: of training afterwards; None for no training.
        steps: of training.
    """

    scheme: str
    start: str = NEAREST
    rate: float | None = None
    steps: int = 40

    @property
    def name(self) -> str:
        """As printed."""
        return self.start if self.rate is None else f"{self.start}, QAT"


ROWS = (
    Row("W4A8"),
    Row("W4A8", rate=2e-4, steps=30),
    Row("W4A8", QEP),
    Row("W4A8", QEP, 5e-5, steps=30),
    Row("INT2 g32"),
    Row("INT2 g32", QEP),
    Row("INT2 g32", QEP, 5e-5),
)


class Student:
    """Quantizes the model, trains it, and compares it with itself in float32."""

    def __init__(self, model: language.LanguageModel, data: Data, size: Size = SIZE):
        self.params, self.config, self.data, self.size = model.params, model.config, data, size
        self._divergence = jax.jit(self._loss)

    def divergence(self, layers: Any) -> float:
        """Mean over the held-out windows."""
        windows = np.split(self.data.held_out[:, :-1], len(self.data.held_out) // BATCH)
        return statistics.fmean(
            float(self._divergence(layers, self.params, jnp.asarray(w))) for w in windows
        )

    def run(self, row: Row, seed: int) -> Result:
        """The divergence of a row, and CPU seconds per step without the first."""
        layers, seconds = self.quantized(row.scheme, row.start), [0.0]
        if row.rate is not None:
            layers, seconds = self._train(row, layers, row.rate, seed)
        return {
            "divergence": self.divergence(layers),
            "cpu_seconds_per_step": statistics.median(seconds[1:] or seconds),
            "steps": 0 if row.rate is None else row.steps,
            "tokens": BATCH * self.size.tokens,
        }

    @cache  # noqa: B019 (as long-lived as the program)
    def quantized(self, scheme: str, start: str) -> Any:
        """The stack of layers, quantized without training."""
        rules, (stack,) = _rules(scheme), self.params["layers"]
        if start == NEAREST:
            return (jq.tree.quantize(stack, rules),)
        rng = np.random.default_rng(0)
        tokens = [self._batch(rng) for _ in range(CALIBRATED // BATCH)]

        def block(weights, x):
            return demo.decoder_layer(weights, self.config, self.params["frequencies"], x)

        method = GPTQ(importance=True, repair=0.5, damping=0.1)
        x = [jq.take(self.params["embedding"], t, axis=0) for t in tokens]
        return (jq.tuning.sequential(block, stack, x, rules, method=method, progress=True),)

    def _train(self, row, layers, rate, seed):
        rules, start, learned = _rules(row.scheme), self.params["layers"], None
        if row.start != NEAREST:
            # The range with the least squared error is the grid of the start.
            start = jq.tree.dequantize(layers)
            learned = training.init_learned(start, rules)
        layers = training.prepare(start, rules, learned)
        optimizer = optimizer_for(layers, row.steps, rate)

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(layers, state, params, tokens):
            gradients = jax.grad(self._loss)(layers, params, tokens)
            updates, state = optimizer.update(gradients, state, layers)
            return optax.apply_updates(layers, updates), state

        layers, state = jax.tree.map(jnp.copy, layers), jax.jit(optimizer.init)(layers)
        rng, seconds = np.random.default_rng(seed), []
        for _ in range(row.steps):
            before = time.process_time()
            carried = step(layers, state, self.params, self._batch(rng))
            layers, state = jax.block_until_ready(carried)
            seconds.append(time.process_time() - before)
        return training.convert(layers), seconds

    def _batch(self, rng):
        return jnp.concatenate([self.data.batch(rng)[:, :-1] for _ in range(BATCH)])

    def _loss(self, layers, params, tokens):
        found, exact = (
            language.apply({**params, "layers": x}, tokens, self.config)
            for x in (layers, params["layers"])
        )
        return jq.tuning.divergence(found, jax.lax.stop_gradient(exact))


def _rules(scheme: str) -> jq.Rule:
    return jq.Rule("*/kernel", SCHEMES[scheme], axis=-1)


def run_all(arguments: argparse.Namespace, about: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the rows that are asked for, and returns what the JSON file holds."""
    console, model = rich.console.Console(width=120), language.load_model()
    student = Student(model, read_data(model.tokenizer, SIZE))
    found = rows_in(arguments.json, "distillation")
    for seed in range(arguments.seeds):
        for row in rows_to_run(arguments.only, seed, found):
            about_row = {"scheme": row.scheme, "contender": row.name, "seed": seed}
            found.append({**about_row, **student.run(row, seed)})
            console.print(found[-1])
            save_rows(arguments.json, about, "distillation", found)
    return {"distillation": found}


def rows_to_run(only: list[str] | None, seed: int, found: list[Result]) -> list[Row]:
    """The rows that have one of these words, and were not run before; without training, once."""
    before = {(r["scheme"], r["contender"], r["seed"]) for r in found}
    return [
        row
        for row in ROWS
        if (not only or set(only) & {*row.scheme.split(), *row.name.replace(",", "").split()})
        and (row.scheme, row.name, seed) not in before
        and (seed == 0 or row.rate is not None)
    ]
