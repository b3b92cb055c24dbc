"""Fine-tuning on another text: QLoRA over an INT4 base, compared with float32 fine-tuning."""

import statistics
from typing import Any

import jax
import optax
import rich.table

import jaxquant as jq
from jaxquant import training

from ..products import bytes_of
from .loop import FINE_TUNING_RATE, Result, Setting, adamw, held_out_loss, make_step, spread, train

SCHEME = jq.Scheme(jq.ArrayConfig(format=jq.INT4, group_size=32))
RANK = 16
# Adapters start at zero, so they have to change more than weights.
ADAPTERS_RATE = 5e-3
FULL, BEFORE, BASE = "float32, all weights", "float32, not fine-tuned", "INT4, not fine-tuned"
QLORA, MERGED = f"QLoRA, rank {RANK}", f"QLoRA, rank {RANK}, merged"
FITS = 2


def run(setting: Setting) -> list[Result]:
    """One result per method and seed; the parameters were trained on another task."""
    task, rules = setting.task, setting.task.rules(SCHEME)
    full = adamw(FINE_TUNING_RATE, setting.fine_steps)
    few = adamw(ADAPTERS_RATE, setting.fine_steps)
    of_all, of_adapters = make_step(task, full), adapters_step(setting, few)
    results = []
    for seed, params in setting.pretrained.items():
        rest = setting.task, setting.fine_steps, (seed, 2), setting.advance
        state = full.init(params)
        tuned, _ = train(of_all, params, state, *rest)
        adapted = training.lora_init(params, rules, RANK, jax.random.key(seed))
        trained, frozen = training.partition(adapted)
        few_state = few.init(trained)
        (trained, _), _ = train(of_adapters, (trained, frozen), few_state, *rest)
        whole = training.combine(trained, frozen)
        size = bytes_of((params, state))
        few_size = bytes_of((whole, few_state))
        results += [
            _result(task, BEFORE, seed, params, bytes_of(params)),
            _result(task, BASE, seed, jq.tree.quantize(params, rules), bytes_of(frozen)),
            _result(task, FULL, seed, tuned, size),
            _result(task, QLORA, seed, whole, few_size),
            _result(task, MERGED, seed, training.merge(whole), few_size),
        ]
    return results


def adapters_step(setting: Setting, optimizer: optax.GradientTransformation) -> Any:
    """One compiled step of parameters (trained, frozen)."""

    @jax.jit
    def step(params, state, batch):
        trained, frozen = params

        def loss(trained):
            return setting.task.loss(training.combine(trained, frozen), batch, jq.matmul)

        found, gradients = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(gradients, state, trained)
        return (optax.apply_updates(trained, updates), frozen), state, found

    return step


def _result(task, name, seed, params, size):
    loss = held_out_loss(task, params)
    return {"contender": name, "seed": seed, "loss": loss, "bytes": size}


def table(title: str, results: list[Result]) -> rich.table.Table:
    """One row per method. The gain is that of fine-tuning all weights in float32."""
    found = rich.table.Table(title=title)
    for name in ("method", "validation loss", "share of the gain", "MB of weights and state"):
        found.add_column(name, no_wrap=True)
    losses = {
        name: {r["seed"]: r["loss"] for r in results if r["contender"] == name}
        for name in dict.fromkeys(r["contender"] for r in results)
    }
    before, full = losses[BEFORE], losses[FULL]
    for name, of in losses.items():
        shares = [(before[s] - of[s]) / (before[s] - full[s]) for s in of]
        size = next(r["bytes"] for r in results if r["contender"] == name)
        share = f"{100 * statistics.fmean(shares):.0f} %"
        found.add_row(name, spread(list(of.values())), share, f"{size / 1e6:.2f}")
    return found
