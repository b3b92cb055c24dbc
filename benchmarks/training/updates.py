"""Time of an update of AdamW by the precision of its states, and that of other libraries.

CPU time of the process: contenders alternate, and the least of some rounds counts, so that other
programs disturb little. Gradients are given.
"""

import argparse
import resource
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
import rich.console

from jaxquant import training

from . import finetuning_peers as peers

Shapes = Sequence[tuple[int, ...]]
SHAPES: dict[str, Shapes] = {
    "4 x (1024, 2048)": [(1024, 2048)] * 4,
    "2 x (3, 3, 512, 512)": [(3, 3, 512, 512)] * 2,
    "(16, 576, 576)": [(16, 576, 576)],
    "64 x (256, 256)": [(256, 256)] * 64,
    "16 x (8192,)": [(8192,)] * 16,
}
STATES = {"float32": None, "8-bit": training.STATE_8_BIT, "4-bit": training.STATE_4_BIT}
RATE, DECAY, ROUNDS = 1e-3, 0.01, 12
# (a step, bytes of its states)
Contender = tuple[Callable[[], object], int]


def jax_contender(rules: Any, shapes: Shapes, donates: bool = True) -> Contender:
    """A step, perhaps with donated parameters and state."""
    optimizer = optax.adamw(RATE, weight_decay=DECAY)
    optimizer = optimizer if rules is None else training.quantized_state(optimizer, rules)
    params = [jax.numpy.asarray(x) for x in _params(shapes)]
    gradients = [p / 100 for p in params]

    def update(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    carried: Any = [params, jax.jit(optimizer.init)(params)]
    size = training.state_bytes(carried[1])
    donated = (0, 1) if donates else ()
    program = jax.jit(update, donate_argnums=donated).lower(*carried, gradients).compile()

    def step():
        carried[:] = jax.block_until_ready(program(*carried, gradients))

    return step, size


def peer_contender(peer: peers.Peer, shapes: Shapes) -> Contender:
    """A step of another library; its first step may compile."""
    params = _params(shapes)
    optimizer = peer.build(params, DECAY)
    optimizer.set_gradients([p / 100 for p in params])
    optimizer.update(RATE)
    return lambda: optimizer.update(RATE), optimizer.state_bytes()


def _params(shapes):
    rng = np.random.default_rng(0)
    return [(rng.standard_normal(s) / 50).astype(np.float32) for s in shapes]


def measure(name: str, shapes: Shapes) -> list[dict[str, Any]]:
    """One row per contender: nanoseconds and bytes of state per parameter."""
    contenders = {(state, True): jax_contender(rules, shapes) for state, rules in STATES.items()}
    contenders |= {(peer.name, True): peer_contender(peer, shapes) for peer in peers.installed()}
    contenders |= {(s, False): jax_contender(rules, shapes, False) for s, rules in STATES.items()}
    seconds = least_seconds({key: step for key, (step, _) in contenders.items()})
    size = sum(int(np.prod(s)) for s in shapes)
    return [
        {
            "shapes": name,
            "contender": key[0],
            "donates": key[1],
            "nanoseconds": 1e9 * seconds[key] / size,
            "bytes": contenders[key][1] / size,
        }
        for key in contenders
    ]


def least_seconds(steps: Mapping[Any, Callable[[], object]]) -> dict[Any, float]:
    """CPU seconds of each step, those of the kernel included, which zeroes memory."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(ROUNDS):
        for name, step in steps.items():
            before = resource.getrusage(resource.RUSAGE_SELF)
            step()
            after = resource.getrusage(resource.RUSAGE_SELF)
            spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
            best[name] = min(best[name], spent)
    return best


def run_all(arguments: argparse.Namespace, about: Mapping[str, Any]) -> dict[str, Any]:
    """Prints all rows, and returns what the JSON file holds."""
    del arguments, about  # The suite writes the file.
    console, found = rich.console.Console(width=120), []
    for name, shapes in SHAPES.items():
        rows = measure(name, shapes)
        console.print(rows)
        found += rows
    return {"updates": found}
