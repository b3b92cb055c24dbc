"""AdamW with 8- and 4-bit states, compared with float32 states."""

import jax
import optax
import rich.table

from jaxquant import training

from . import versus
from .loop import PRETRAINING_RATE, Result, Setting, adamw, held_out_loss, make_step, train

WAYS = {"8-bit": training.STATE_8_BIT, "4-bit": training.STATE_4_BIT}
# Loss above float32's that is lost, and bytes of the state, as shares.
GOALS = {"8-bit": 0.005, "4-bit": 0.015}
BYTES = {"8-bit": 0.27, "4-bit": 0.15}
FITS = len(WAYS)


def run(setting: Setting) -> list[Result]:
    """One result per state and seed, with its bytes."""
    task, steps = setting.task, setting.steps
    exact = adamw(PRETRAINING_RATE, steps)
    full = _bytes(exact, task)
    results = [_result("float32", s, loss, full, full) for s, loss in setting.losses.items()]
    for name, rules in WAYS.items():
        optimizer = training.quantized_state(exact, rules)
        step, size = make_step(task, optimizer), _bytes(optimizer, task)
        for seed in setting.losses:
            params = task.init(jax.random.key(seed))
            state = optimizer.init(params)
            params, _ = train(step, params, state, task, steps, (seed, 0), setting.advance)
            results.append(_result(name, seed, held_out_loss(task, params), size, full))
    return results


def _bytes(optimizer: optax.GradientTransformation, task):
    return training.state_bytes(optimizer.init(task.init(jax.random.key(0))))


def _result(name, seed, loss, size, full):
    return {"contender": name, "seed": seed, "loss": loss, "bytes": size, "share": size / full}


def table(title: str, results: list[Result]) -> rich.table.Table:
    """One row per state. Red: a loss or a size above the goal."""
    columns = {
        "kB of state": lambda r: (f"{r['bytes'] / 1000:.1f}", False),
        "float32 = 1": lambda r: (f"{r['share']:.3f}", r["share"] > BYTES.get(r["contender"], 1)),
    }
    return versus.table(title, results, "float32", GOALS, columns)
