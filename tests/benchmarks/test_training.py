"""What the suite of training is made of, and the suite itself on tiny sizes."""

import json
import math
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console

import jaxquant as jq
from benchmarks import machine, training
from benchmarks.__main__ import main
from benchmarks.training import (
    gradients,
    loop,
    model,
    parts,
    products,
    qat,
    qlora,
    saved,
    updates,
    versus,
)
from benchmarks.training.model import BytesConfig
from benchmarks.training.tasks import digits_task, documentation, source, text_task
from jaxquant.training import Prepared, init_learned, prepare

from .slow_transformer import attend, normalize

CONFIG = BytesConfig(layers=1, width=32, hidden=128, heads=2, seen=3, length=11)
PRODUCTS = ("int8", "float8, delayed scaling")
SUMS = ("8-bit, error feedback",)
SLOPES = (1 / 16, 1 / 256)


@pytest.fixture(scope="module")
def params():
    """No scale of a norm is one."""
    made = model.random_params(CONFIG, jax.random.key(0))
    scales = np.random.default_rng(1).uniform(0.5, 1.5, (3, 32)).astype(np.float32)
    made["layers"][0]["norms"] = jnp.asarray(scales[:2])
    return made | {"norm": jnp.asarray(scales[2])}


def logits_of(params, text):
    """Of each place, from all bytes up to it, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = np.zeros((len(text), CONFIG.width))
    for place in range(len(text)):
        for back in range(min(CONFIG.seen, place + 1)):
            x[place] += params["embedding"][back, text[place - back]]
    for weights in params["layers"]:
        x = x + attend(normalize(x, weights["norms"][0]), weights, SLOPES)
        up = normalize(x, weights["norms"][1]) @ weights["up"]["kernel"]
        gelu = up / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        x = x + gelu @ weights["down"]["kernel"]
    return normalize(x, params["norm"]) @ params["head"]["kernel"]


def test_the_model_equals_a_slow_one(params):
    text = np.random.default_rng(0).integers(0, 256, (3, 12)).astype(np.uint8)
    wanted = np.stack([logits_of(params, row[:-1]) for row in text])
    found = jax.jit(model.logits)(params, CONFIG, jnp.asarray(text[:, :-1]))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    shares = np.exp(wanted) / np.exp(wanted).sum(-1, keepdims=True)
    of_next = [shares[b, t, text[b, t + 1]] for b in range(3) for t in range(11)]
    loss = jax.jit(model.next_byte_loss)(params, CONFIG, jnp.asarray(text))
    np.testing.assert_allclose(loss, -np.mean(np.log(of_next)), rtol=1e-5)


def test_texts_are_trained_on_or_held_out_as_a_whole():
    texts = [bytes([i]) * (10 + i) for i in range(30)]
    task = text_task("bytes", texts, CONFIG, batch=2)
    rng = np.random.default_rng(0)
    drawn = {int(x) for _ in range(300) for x in np.unique(task.batch(rng))}
    separator = ord("\n")
    assert drawn == set(range(30)) - {5, 15, 25} | {separator}
    held_out = np.concatenate([np.asarray(b).ravel() for b in task.held_out])
    assert {b.shape for b in task.held_out} == {(2, CONFIG.length + 1)}
    assert held_out.tobytes() == b"\n\n".join(texts[5::10])[: held_out.size]
    assert len(text_task("bytes", texts, CONFIG, batch=2, windows=3).held_out) == 1


def test_texts_without_a_held_out_batch_are_refused():
    with pytest.raises(ValueError, match=r"hold 2 windows of 12 bytes .* got 1 windows in 6 texts"):
        text_task("bytes", [b"abc" * 5] * 6, CONFIG, batch=2)


def test_the_texts_are_there():
    assert sum(map(len, documentation())) > 400_000
    assert any(text.startswith(b'"""Quantization inside training loops') for text in source())


def digits():
    """Images that carry their number as a pixel; the labels follow from the others."""
    images = np.random.default_rng(0).uniform(0, 16, (40, 6))
    images[:, 0] = 16 * np.arange(40) / 39
    return digits_task(images, np.arange(40) % 3, (5,), batch=4)


def test_half_of_the_digits_are_held_out_and_the_loss_is_the_cross_entropy():
    task, rng = digits(), np.random.default_rng(1)
    batches = [task.batch(rng) for _ in range(100)]
    drawn = {round(39 * float(x)) for images, _ in batches for x in images[:, 0]}
    images, labels = map(np.asarray, task.held_out[0])
    assert len(task.held_out) == 1
    held_out = {round(39 * float(x)) for x in images[:, 0]}
    assert (len(drawn), drawn | held_out) == (20, set(range(40)))
    np.testing.assert_array_equal(np.round(39 * images[:, 0]) % 3, labels)
    params = task.init(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1, params)
    up, out = ((np.asarray(p["kernel"], np.float64), np.asarray(p["bias"])) for p in params)
    logits = np.maximum(images @ up[0] + up[1], 0) @ out[0] + out[1]
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = -np.mean([math.log(s[n]) for s, n in zip(shares, labels, strict=True)])
    assert loop.held_out_loss(task, params) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_learned_steps_move_by_a_lower_rate_and_do_not_decay(params):
    rules = jq.Rule("up/kernel", qat.SCHEMES["W4A4"])
    layer = {"up": params["layers"][0]["up"]}
    start = prepare(layer, rules, init_learned(layer, rules, range=None))
    optimizer = qat.optimizer_for(start, 20)
    ones, none = (jax.tree.map(lambda x, v=v: jnp.full_like(x, v), start) for v in (1, 0))
    moves = []
    for tree in (ones, none):
        state = optimizer.init(start)
        for _ in range(3):  # The first step has rate 0, the third the highest.
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(tree, state, start)
        moves.append([float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(updates)])
    (weight, step), (decay, nothing) = moves
    assert step == pytest.approx(qat.STEP_RATE * loop.FINE_TUNING_RATE, rel=1e-3)
    assert weight == pytest.approx(loop.FINE_TUNING_RATE + decay, rel=1e-2)
    assert (decay > 0, nothing) == (True, 0)


def test_the_rate_rises_and_falls():
    rate = loop.schedule(2.0, 50)
    found = np.asarray(jnp.stack([jnp.asarray(rate(i)) for i in (0, 5, 50)]))
    np.testing.assert_allclose(found, [0, 2, 0.02], rtol=1e-6)


def in_text(table):
    """(what is printed, what of it is red)."""
    console = rich.console.Console(width=200, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(table)
    text = capture.get()
    red = [part.split("\x1b[0m")[0].strip() for part in text.split("\x1b[31m")[1:]]
    return text, red


def qat_results(ptq, ste, lsq):
    losses = {qat.PTQ: ptq, qat.STE: ste, qat.LSQ: lsq}
    rows = [("W4A4", method, found) for method, found in losses.items()]
    return [
        {"scheme": scheme, "method": method, "seed": seed, "loss": loss + seed}
        for scheme, method, found in [("", qat.FLOAT, (1.0, 1.0)), *rows]
        for seed, loss in enumerate(found)
    ]


def test_what_is_recovered_is_counted_seed_by_seed_and_lost_goals_are_red():
    results = qat_results((1.1, 1.2), (1.01, 1.1), (1.03, 1.15))
    np.testing.assert_allclose(qat.shares(results, "W4A4", qat.STE), [0.9, 0.5])
    text, red = in_text(qat.table("a table", results))
    assert "70 %" in text
    assert "50 %" in text
    assert red == ["1.5900 ± 0.7920", "48 %", "25 %"]
    assert "PTQ loses < 0.02" in in_text(qat.table("", qat_results((1.01,), (1.5,), (1.0,))))[0]


def test_losses_are_held_against_the_reference_seed_by_seed():
    found = {"float32": (1.0, 2.0), "8-bit": (1.01, 2.02), "4-bit": (1.03, 2.0)}
    results = [
        {"contender": name, "seed": seed, "loss": loss, "size": name}
        for name, losses in found.items()
        for seed, loss in enumerate(losses)
    ]
    sizes = {"size": lambda r: (r["size"], r["size"] == "4-bit")}
    table = versus.table("a table", results, "float32", {"8-bit": 0.005, "4-bit": 0.02}, sizes)
    text, red = in_text(table)
    assert "+1.50" in text
    assert red == ["+1.00", "+1.00", "4-bit"]


@pytest.fixture
def tiny(monkeypatch):
    """Products of 32 pixels by 128 digits in place of all tasks: they train in no time."""
    images = np.random.default_rng(0).uniform(0, 1, (2, 40, 32))
    first, second = (digits_task(x, 3 * np.arange(40) + 10, (), batch=8) for x in images)
    tasks = {parts.DOCUMENTATION: first, parts.DIGITS: None, parts.SOURCE: second}
    monkeypatch.setattr(parts, "all_tasks", lambda: tasks)
    monkeypatch.setattr(machine, "description", lambda: {"processor": "a test"})
    monkeypatch.setattr(qlora, "RANK", 2)
    monkeypatch.setattr(products, "WAYS", {k: products.WAYS[k] for k in PRODUCTS})
    monkeypatch.setattr(gradients, "WAYS", {k: gradients.WAYS[k] for k in SUMS})
    monkeypatch.setattr(qat, "SCHEMES", {k: qat.SCHEMES[k] for k in ("W4A4",)})
    return tasks


def run_suite(options, path, monkeypatch):
    command = ["benchmarks", "--suite", "training", "--json", str(path), *options.split()]
    monkeypatch.setattr(sys, "argv", command)
    with jax.numpy_dtype_promotion("standard"):
        main()
    return json.loads(path.read_text())


@pytest.mark.slow
def test_quantization_in_training_is_measured_on_the_converted_tree(tiny, tmp_path, monkeypatch):
    seen = []

    def measured(task, params):
        leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Prepared | jq.QTensor))
        seen.append({type(x) for x in leaves if not isinstance(x, jax.Array)})
        return loop.held_out_loss(task, params)

    monkeypatch.setattr(qat, "held_out_loss", measured)
    options = "--parts qat --seeds 2 --steps 8"
    found = run_suite(options, tmp_path / "found.json", monkeypatch)
    assert seen == [set()] * 2 + [{jq.QTensor}] * 8
    methods = [qat.PTQ, qat.PTQ_MSE, qat.STE, qat.LSQ]
    rows = [(r["scheme"], r["method"], r["seed"]) for r in found["training"]]
    wanted = [(s, m, seed) for s in qat.SCHEMES for m in methods for seed in (0, 1)]
    assert rows == [("", qat.FLOAT, 0), ("", qat.FLOAT, 1), *wanted]
    assert len({r["loss"] for r in found["training"]}) == len(rows)
    assert (found["steps"], found["seeds"], list(found["not_run"])) == (8, 2, [parts.DIGITS])


def test_files_keep_their_other_parts(tmp_path, monkeypatch):
    path, rows = tmp_path / "found.json", [{"seed": 0}]
    assert saved.rows_in(path, "smollm2") == []
    saved.save_rows(None, {}, "smollm2", rows)
    saved.save_rows(path, {"machine": "old"}, "smollm2", rows)
    saved.save_rows(path, {"machine": "new"}, "distillation", [])
    saved.save_rows(path, {"machine": "new"}, "distillation", rows)
    wanted = {"machine": "new", "smollm2": rows, "distillation": rows}
    assert json.loads(path.read_text()) == wanted
    assert saved.rows_in(path, "smollm2") == rows
    monkeypatch.setattr(updates, "run_all", lambda arguments, about: {"updates": [1]})
    found = run_suite("--parts updates", path, monkeypatch)
    assert found.pop("machine") not in ("old", "new")
    assert found == {"smollm2": rows, "distillation": rows, "updates": [1]}


def test_training_learns_and_equal_seeds_are_equal():
    task = digits()
    with jax.numpy_dtype_promotion("standard"):
        params = [loop.pretrain(task, seed, 60, lambda _: None) for seed in (3, 3, 4)]
    losses = [loop.held_out_loss(task, p) for p in params]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] < loop.held_out_loss(task, task.init(jax.random.key(3)))


@pytest.mark.slow
def test_the_other_parts_print_their_tables(tiny, tmp_path, monkeypatch, capsys):
    options = "--parts products optimizers qlora gradients --seeds 1 --steps 6"
    found = run_suite(options, tmp_path / "found.json", monkeypatch)
    by_part = {}
    for r in found["training"]:
        by_part.setdefault(r["part"], {})[r["contender"]] = r
    assert list(by_part) == ["products", "optimizers", "qlora", "gradients"]
    assert all(math.isfinite(r["loss"]) for r in found["training"])
    by_product, by_state, by_adapters, by_sum = by_part.values()
    assert list(by_product) == ["float32", *PRODUCTS]
    assert all(r["steps_per_second"] > 0 and r["speed"] > 0 for r in by_product.values())
    losses = {name: r["loss"] for name, r in by_product.items()}
    assert list(losses.values()).count(losses["float32"]) == 1, losses
    assert by_state["float32"]["loss"] == by_product["float32"]["loss"]
    assert 1 > by_state["8-bit"]["share"] > by_state["4-bit"]["share"]
    losses = {name: r["loss"] for name, r in by_adapters.items()}
    assert list(losses) == [qlora.BEFORE, qlora.BASE, qlora.FULL, qlora.QLORA, qlora.MERGED]
    assert len(set(losses.values())) == 5
    assert by_adapters[qlora.BASE]["bytes"] < by_adapters[qlora.QLORA]["bytes"]
    assert by_adapters[qlora.QLORA]["bytes"] < by_adapters[qlora.FULL]["bytes"]
    losses = {name: r["loss"] for name, r in by_sum.items()}
    assert list(losses) == ["float32", *SUMS]
    assert len(set(losses.values())) == 2
    printed = capsys.readouterr().out
    columns = ("steps per second", "kB of state", "share of the gain", "validation loss")
    assert all(column in printed for column in columns)


def test_what_the_machine_lacks_is_said(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    found = parts.missing({parts.DIGITS: None, parts.SOURCE: digits()}, list(parts.PARTS))
    assert list(found) == [parts.DIGITS, "gradients"]
    assert found[parts.DIGITS] == "for scikit-learn is not installed"
    assert found["gradients"].startswith(
        "which needs 8 devices and found 2; on CPU, set XLA_FLAGS="
    )


def test_the_parts_are_those_that_can_be_asked_for():
    more = training.UPDATES, training.SMOLLM2, training.DISTILLATION
    assert (*parts.PARTS, *more) == training.PARTS


def test_spread_is_the_standard_deviation():
    assert loop.spread([1.0, 2.0, 4.0], 2) == f"2.33 ± {statistics.stdev([1, 2, 4]):.2f}"
    assert loop.spread([1.5], 1) == "1.5 ± 0.0"


def test_steps_with_optax_are_compiled_once(tiny):
    task = tiny[parts.DOCUMENTATION]
    optimizer = optax.sgd(0.1)
    step = loop.make_step(task, optimizer)
    params = task.init(jax.random.key(0))
    loop.train(step, params, optimizer.init(params), task, 3, (0,), lambda _: None)
    assert step._cache_size() == 1
