"""The training loop of all contenders."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

import jaxquant as jq

from .model import Product
from .tasks import Task

# The share of the steps in which the learning rate rises; then it falls as a cosine.
WARMUP = 0.1
PRETRAINING_RATE, FINE_TUNING_RATE = 3e-3, 1e-3
DECAY = 0.01

Result = dict[str, Any]
# (parameters, state, batch) -> (parameters, state, loss)
Step = Callable[[Any, Any, Any], tuple[Any, Any, jax.Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """The input of a part of the suite.

    Attributes:
        task: what is learned.
        pretrained: float32 parameters by seed, each trained for `steps`.
        losses: their loss on what is held out, by seed.
        steps: of training from the start.
        fine_steps: of fine-tuning.
        advance: called with the share of a training that is done.
    """

    task: Task
    pretrained: dict[int, Any]
    losses: dict[int, float]
    steps: int
    fine_steps: int
    advance: Callable[[float], None] = lambda share: None


def schedule(peak: float, steps: int) -> optax.Schedule:
    """Rises to `peak` and decays to a hundredth of it."""
    warmup = max(1, round(WARMUP * steps))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), peak / 100)


def adamw(peak: float, steps: int) -> optax.GradientTransformation:
    """AdamW with the suite's schedule and weight decay."""
    return optax.adamw(schedule(peak, steps), weight_decay=DECAY)


def make_step(
    task: Task, optimizer: optax.GradientTransformation, product: Product = jq.matmul
) -> Step:
    """One compiled step of an optax loop. The parameters may be prepared."""

    @jax.jit
    def step(params, state, batch):
        loss, gradients = jax.value_and_grad(task.loss)(params, batch, product)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def train(
    step: Step,
    params: Any,
    state: Any,
    task: Task,
    steps: int,
    seed: tuple[int, ...],
    advance: Callable[[float], None],
) -> tuple[Any, Any]:
    """(parameters, state) after some steps; equal seeds draw equal batches."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        params, state, loss = step(params, state, task.batch(rng))
        loss.block_until_ready()
        advance(1 / steps)
    return params, state


def held_out_loss(task: Task, params: Any, product: Product = jq.matmul) -> float:
    """Mean loss on held-out data, in nats."""
    loss = jax.jit(task.loss, static_argnums=2)
    return statistics.fmean(float(loss(params, b, product)) for b in task.held_out)


def pretrain(task: Task, seed: int, steps: int, advance: Callable[[float], None]) -> Any:
    """Float32 parameters, trained from the start."""
    optimizer = adamw(PRETRAINING_RATE, steps)
    params = task.init(jax.random.key(seed))
    step = make_step(task, optimizer)
    return train(step, params, optimizer.init(params), task, steps, (seed, 0), advance)[0]


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"
