"""SmolLM2 fine-tuned on Python's documentation, by each recipe and optimizer, against float32.

    python -m benchmarks --suite training --parts smollm2 [--only int8 torchao] [--seeds 3]

All rows of a seed start from the same weights, the dithered model of `accuracy.language`, and see
the same batches; every weight is trained. Losses are on held-out topics, before and after.
Embedding and head, which are one matrix, stay in float32. CPU seconds are those of all threads, and
so tell of rows that run beside other programs. With `--json`, rows are added to the file
as they finish, so a run that is cut off can be continued with `--only`.
"""

import argparse
import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console

import jaxquant as jq
from jaxquant import training

from ..accuracy import language
from . import finetuning_peers as peers
from .loop import DECAY, Result, schedule
from .saved import rows_in, save_rows
from .tasks import APART, documentation

RATE = 1e-4
REFERENCE = "float32"


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained and tested.

    Attributes:
        steps: of training.
        tokens: that are predicted in each step, one window.
        held_out: windows to test on.
    """

    steps: int = 20
    tokens: int = 128
    held_out: int = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        config: of all products of kernels; None for float32.
        is_delayed: whether scaling is delayed.
        float_layers: numbers of first and of last layers whose products stay in float32.
        state: rules of `quantized_state`; None for states in float32.
        qwix: fields of Qwix's rule, by which it computes the products; None for ours.
    """

    config: training.ProductConfig | None = None
    is_delayed: bool = False
    float_layers: tuple[int, int] = (0, 0)
    state: Any = None
    qwix: Mapping[str, str] | None = None


ROWS: Mapping[str, Row] = {
    REFERENCE: Row(),
    "INT8_TRAINING": Row(training.INT8_TRAINING),
    "SWITCHBACK": Row(training.SWITCHBACK),
    "FP8_TRAINING": Row(training.FP8_TRAINING),
    "FP8_TRAINING, delayed": Row(training.FP8_TRAINING, is_delayed=True),
    "FP8_BLOCKS": Row(training.FP8_BLOCKS),
    "MXFP8_TRAINING": Row(training.MXFP8_TRAINING),
    # A sixth of the layers, as in the paper, first and last ones.
    "NVFP4_TRAINING": Row(training.NVFP4_TRAINING, float_layers=(2, 3)),
    # Weights by a scale for each 16 of the axis that a product contracts, instead of each 16 x 16.
    "NVFP4_TRAINING, weights in groups": Row(
        dataclasses.replace(training.NVFP4_TRAINING, rhs=jq.ArrayConfig(format=jq.NVFP4)),
        float_layers=(2, 3),
    ),
    "8-bit AdamW": Row(state=training.STATE_8_BIT),
    "4-bit AdamW": Row(state=training.STATE_4_BIT),
    **{name: Row(qwix=fields) for name, fields in peers.QWIX.items()},
}


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """Ids of the documentation.

    Attributes:
        trained: of all topics to train on, one after another.
        held_out: windows (n, tokens + 1) of the other topics.
    """

    trained: np.ndarray
    held_out: np.ndarray

    def batch(self, rng: np.random.Generator) -> jax.Array:
        """A window at a random place, (1, tokens + 1)."""
        length = self.held_out.shape[1]
        start = rng.integers(0, len(self.trained) - length + 1)
        return jnp.asarray(self.trained[None, start : start + length])


def read_data(tokenizer: Any, size: Size, texts: list[bytes] | None = None) -> Data:
    """Every tenth topic is held out.

    Raises:
        ValueError: the topics are too short.
    """
    topics = documentation() if texts is None else texts
    ids = [np.asarray(tokenizer.encode(text.decode()), np.int32) for text in topics]
    first, length = APART // 2, size.tokens + 1
    trained = np.concatenate([x for i, x in enumerate(ids) if i % APART != first])
    apart = np.concatenate(ids[first::APART])
    windows = apart[: len(apart) // length * length].reshape(-1, length)
    if len(windows) < size.held_out or len(trained) < length:
        raise ValueError(
            f"The held-out topics must have {size.held_out} windows of {length} tokens; got "
            f"{len(windows)}. Ask for fewer."
        )
    every = len(windows) // size.held_out
    return Data(trained, windows[::every][: size.held_out])


def split_layers(params: Any, first: int, last: int) -> Any:
    """The layers in three stacks, of which the second is without so many first and last ones."""
    (stack,) = params["layers"]
    if first == last == 0:
        return params
    count = len(jax.tree.leaves(stack)[0])
    parts = (slice(None, first), slice(first, count - last), slice(count - last, None))
    return {**params, "layers": tuple(jax.tree.map(lambda x, s=s: x[s], stack) for s in parts)}


def loss_of(params: Any, tokens: jax.Array, config: Any) -> jax.Array:
    """Mean cross-entropy of the next token."""
    found = jax.nn.log_softmax(language.apply(params, tokens[:, :-1], config))
    return -jnp.mean(jnp.take_along_axis(found, tokens[:, 1:, None], -1))


class Trainer:
    """Trains one row after another from the same weights."""

    def __init__(self, model: language.LanguageModel, data: Data, size: Size):
        self.model, self.data, self.size = model, data, size
        self._loss = partial(loss_of, config=model.config)
        self._held_out_loss = jax.jit(self._loss)

    def held_out_loss(self, params: Any) -> float:
        """Mean over the held-out windows."""
        windows = map(jnp.asarray, self.data.held_out[:, None])
        return statistics.fmean(float(self._held_out_loss(params, w)) for w in windows)

    def run(self, row: Row, seed: int) -> Result:
        """The loss of a row, bytes of its state, and CPU seconds per step without the first."""
        params = split_layers(self.model.params, *row.float_layers)
        optimizer = optax.adamw(schedule(RATE, self.size.steps), weight_decay=DECAY)
        if row.state is not None:
            optimizer = training.quantized_state(optimizer, row.state)
        stack = 1 if any(row.float_layers) else 0
        rules = {"embedding": None, f"layers/{stack}/*/kernel": row.config}
        scaling = {}
        if row.is_delayed:
            batch = jax.ShapeDtypeStruct((1, self.size.tokens + 1), jnp.int32)
            scaling = training.init_scaling(self._loss, rules, params, batch)

        def loss(params, scaling, key, tokens):
            fn = self._loss
            if row.qwix is not None:
                fn = peers.with_qwix(fn, row.qwix)
            if row.config is not None:
                fn = training.train_products(fn, rules, key=key, scaling=scaling)
            return fn(params, tokens)

        @partial(jax.jit, donate_argnums=(0, 1, 2))
        def step(params, scaling, state, key, tokens):
            gradients, observed = jax.grad(loss, (0, 1))(params, scaling, key, tokens)
            updates, state = optimizer.update(gradients, state, params)
            if scaling:
                scaling = training.update_scaling(scaling, observed)
            return optax.apply_updates(params, updates), scaling, state

        params, state = jax.tree.map(jnp.copy, params), jax.jit(optimizer.init)(params)
        rng, seconds = np.random.default_rng(seed), []
        for key in jax.random.split(jax.random.key(seed), self.size.steps):
            start = time.process_time()
            carried = step(params, scaling, state, key, self.data.batch(rng))
            params, scaling, state = jax.block_until_ready(carried)
            seconds.append(time.process_time() - start)
        return self._result(params, training.state_bytes(state), seconds)

    def run_peer(self, peer: peers.Peer, seed: int) -> Result:
        """The same for another library's optimizer."""
        gradients_of = jax.jit(jax.grad(self._loss))
        rates: Any = schedule(RATE, self.size.steps)
        optimizer = peer.build(self.model.params, DECAY)
        params = self.model.params
        rng, seconds = np.random.default_rng(seed), []
        for number in range(self.size.steps):
            start = time.process_time()
            gradients = gradients_of(params, self.data.batch(rng))
            params = optimizer.step(gradients, float(rates(number)))
            seconds.append(time.process_time() - start)
        return self._result(params, optimizer.state_bytes(), seconds)

    def _result(self, params, size, seconds):
        later = seconds[1:] or seconds
        return {
            "loss": self.held_out_loss(params),
            "bytes": size,
            "cpu_seconds_per_step": statistics.median(later),
            "steps": self.size.steps,
            "tokens": self.size.tokens,
        }


def run_all(arguments: argparse.Namespace, about: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the rows that are asked for, prints the table, and returns what the JSON file holds."""
    console, size = rich.console.Console(width=120), Size()
    model = language.load_model()
    trainer = Trainer(model, read_data(model.tokenizer, size), size)
    found = rows_in(arguments.json, "smollm2")
    start = trainer.held_out_loss(model.params)
    for seed in range(arguments.seeds):
        for name, result in _results(trainer, seed, arguments.only, found):
            found.append({"contender": name, "seed": seed, "start": start, **result})
            console.print(found[-1])
            save_rows(arguments.json, about, "smollm2", found)
    return {"smollm2": found}


def _results(
    trainer: Trainer, seed: int, only: list[str] | None, found: list[Result]
) -> Iterator[tuple[str, Result]]:
    """The rows of a seed that are asked for and were not run before."""
    before = {(r["contender"], r["seed"]) for r in found}
    has_qwix = importlib.util.find_spec("qwix") is not None
    rows = {name: row for name, row in ROWS.items() if has_qwix or row.qwix is None}
    runs = {name: partial(trainer.run, row) for name, row in rows.items()}
    runs |= {peer.name: partial(trainer.run_peer, peer) for peer in peers.installed()}
    for name, run in runs.items():
        is_asked = not only or any(word == name or word in name.split() for word in only)
        if is_asked and (name, seed) not in before:
            yield name, run(seed)
