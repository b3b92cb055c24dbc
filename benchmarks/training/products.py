"""Training with quantized matrix multiplications, forward and backward, compared with float32.

Weights stay float32, and are measured as such. Speed is that of a training step, by turns.
"""

import dataclasses
import fnmatch
from typing import Any

import jax
import optax
import rich.table

from jaxquant import training

from ..timing import by_turns, ratio
from . import versus
from .loop import PRETRAINING_RATE, Result, Setting, Step, adamw, held_out_loss, make_step, train
from .tasks import Task

# (how operands are quantized, whether scaling is delayed)
WAYS = {
    "int8": (training.INT8_TRAINING, False),
    "int8, float weight gradient": (training.SWITCHBACK, False),
    "float8": (training.FP8_TRAINING, False),
    "float8, delayed scaling": (training.FP8_TRAINING, True),
}
# Largest accepted increase of the loss over float32, as a share.
GOAL = 0.01
ROUNDS = 10
FITS = len(WAYS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A weight with the key and the scaling of its matrix multiplication. A pytree."""

    weight: jax.Array
    key: jax.Array
    scaling: training.DelayedScaling | None


def scalings(task: Task, params: Any, is_delayed: bool) -> Any:
    """For each leaf, the scaling of its matrix multiplication, or None."""
    init = training.DelayedScaling.init if is_delayed else lambda: None
    return _map_kernels(task, lambda _: init(), lambda _: None, params)


def quantized_step(
    task: Task, optimizer: optax.GradientTransformation, config: training.ProductConfig
) -> Step:
    """One compiled step of parameters (weights, histories) and of state (optimizer's, key)."""

    def product(x, kernel):
        options = {"key": kernel.key, "scaling": kernel.scaling}
        return training.matmul(x, kernel.weight, config=config, **options)

    def loss(params, key, batch):
        weights, histories = params
        keys = iter(jax.random.split(key, len(jax.tree.leaves(weights))))
        with_needs = _map_kernels(
            task, lambda w, s: Kernel(w, next(keys), s), lambda w, _: w, weights, histories
        )
        return task.loss(with_needs, batch, product)

    @jax.jit
    def step(params, state, batch):
        state, key = state
        key, now = jax.random.split(key)
        found, gradients = jax.value_and_grad(loss)(params, now, batch)
        updates, state = optimizer.update(gradients, state, params)
        updated = optax.apply_updates(params, updates)
        if jax.tree.leaves(params[1]):
            updated = training.update_scaling(updated, gradients)
        return updated, (state, key), found

    return step


def _map_kernels(task, of_kernel, of_other, tree, *rest):
    """Maps one function over the kernels of a tree, another over the other leaves."""

    def choose(path, *leaves):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return (of_kernel if fnmatch.fnmatch(name, task.kernels) else of_other)(*leaves)

    others = [jax.tree.structure(tree).flatten_up_to(other) for other in rest]
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    found = [choose(*pair, *more) for pair, *more in zip(paths, *others, strict=True)]
    return jax.tree.unflatten(treedef, found)


def run(setting: Setting) -> list[Result]:
    """One result per method and seed; all have the steps per second of the last seed."""
    task, steps = setting.task, setting.steps
    exact = adamw(PRETRAINING_RATE, steps)
    results = [_result("float32", seed, loss) for seed, loss in setting.losses.items()]
    start = task.init(jax.random.key(0))
    timed: dict[str, Any] = {"float32": (make_step(task, exact), start, exact.init(start))}
    optimizer = training.skip_scaling(exact)
    for name, (config, is_delayed) in WAYS.items():
        step = quantized_step(task, optimizer, config)
        for seed in setting.losses:
            weights = task.init(jax.random.key(seed))
            params = weights, scalings(task, weights, is_delayed)
            state = optimizer.init(params), jax.random.key(seed)
            timed[name] = step, params, state
            params, _ = train(step, params, state, task, steps, (seed, 0), setting.advance)
            results.append(_result(name, seed, held_out_loss(task, params[0])))
    return _with_speed(task, results, timed)


def _result(name, seed, loss):
    return {"contender": name, "seed": seed, "loss": loss}


def _with_speed(task, results, timed):
    batch = task.held_out[0]
    batch = jax.tree.map(lambda x: x[:64], batch)
    calls = {
        name: lambda step=step, params=params, state=state: step(params, state, batch)[2]
        for name, (step, params, state) in timed.items()
    }
    times = by_turns(calls, ROUNDS)
    for r in results:
        name = r["contender"]
        r["steps_per_second"] = len(times[name]) / sum(times[name])
        r["speed"] = 1 / ratio(times, name, "float32")
    return results


def table(title: str, results: list[Result]) -> rich.table.Table:
    """One row per method. Red: a loss above the goal, or a speed below float32."""
    columns = {
        "steps per second": lambda r: (f"{r['steps_per_second']:.2f}", False),
        "speed, float32 = 1": lambda r: (f"{r['speed']:.2f}", r["speed"] < 1),
    }
    return versus.table(title, results, "float32", dict.fromkeys(WAYS, GOAL), columns)
