"""Quantized all-reduce of gradients, compared with a float32 all-reduce.

Each device gets a part of the batch. On a machine with a single device, eight are simulated by
`XLA_FLAGS=--xla_force_host_platform_device_count=8`, so speed is not measured.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import rich.table
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant import training

from . import versus
from .loop import PRETRAINING_RATE, Result, Setting, Step, adamw, held_out_loss, train
from .tasks import Task

DEVICES = 8
_INT4 = jq.ArrayConfig(format=jq.INT4, group_size=64)
# (config, whether error feedback is on)
WAYS = {
    "8-bit, error feedback": (training.GRADIENT_8_BIT, True),
    "8-bit": (training.GRADIENT_8_BIT, False),
    "4-bit, error feedback": (_INT4, True),
    "4-bit": (_INT4, False),
}
# Largest accepted increase of the loss over float32, as a share.
GOALS = {"8-bit, error feedback": 0.01}
FITS = len(WAYS)


def sharded_step(
    task: Task, optimizer: optax.GradientTransformation, config: jq.ArrayConfig, has_error: bool
) -> Step:
    """One compiled step. The state is that of the optimizer and the errors of all devices."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P(), P(), P("data")),
    )
    def mean_gradient(params, errors, batch):
        params = jax.lax.pcast(params, "data", to="varying")
        loss, gradients = jax.value_and_grad(task.loss)(params, batch, jq.matmul)
        loss = jax.lax.pmean(loss, "data")
        if not has_error:
            return loss, _mean(training.quantized_psum(gradients, "data", config)), errors
        error = jax.tree.map(lambda e: e[0], errors)
        total, error = training.quantized_psum(gradients, "data", config, error=error)
        return loss, _mean(total), jax.tree.map(lambda e: e[None], error)

    @jax.jit
    def step(params, state, batch):
        state, errors = state
        loss, gradients, errors = mean_gradient(params, errors, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), (state, errors), loss

    return step


def _mean(total):
    return jax.tree.map(lambda x: x / DEVICES, total)


def run(setting: Setting) -> list[Result]:
    """One result per method and seed."""
    task, steps = setting.task, setting.steps
    optimizer = adamw(PRETRAINING_RATE, steps)
    results = [_result("float32", seed, loss) for seed, loss in setting.losses.items()]
    for name, (config, has_error) in WAYS.items():
        step = sharded_step(task, optimizer, config, has_error)
        for seed in setting.losses:
            params = task.init(jax.random.key(seed))
            errors = jax.tree.map(lambda p: jnp.zeros((DEVICES, *p.shape)), params)
            state = optimizer.init(params), errors
            params, _ = train(step, params, state, task, steps, (seed, 0), setting.advance)
            results.append(_result(name, seed, held_out_loss(task, params)))
    return results


def _result(name, seed, loss):
    return {"contender": name, "seed": seed, "loss": loss}


def table(title: str, results: list[Result]) -> rich.table.Table:
    """One row per method. Red: a loss above the goal."""
    return versus.table(title, results, "float32", GOALS, {})
