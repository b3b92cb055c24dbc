"""Accuracy and speed of quantization in training: a transformer on bytes, and digits.

    python -m benchmarks --suite training [--parts qat optimizers] [--seeds 3] [--steps 500]

Every result starts from, or is compared with, float32 parameters trained once per seed. Losses are
on held-out text and digits: mean and standard deviation over the seeds. Comparisons are per seed.
Missed goals are red.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import rich.console
import rich.progress
import rich.table

from . import gradients, products, qat, qlora, states
from .loop import Result, Setting, held_out_loss, pretrain
from .model import BytesConfig
from .tasks import Task, documentation, installed_digits, source, text_task

# Steps of fine-tuning, as a share of those of training from the start.
FINE = 0.5
DOCUMENTATION, DIGITS, SOURCE = "documentation", "digits", "this library's source"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the suite.

    Attributes:
        title: title of its tables.
        run, table: trains, and shows the results.
        fits: trainings per task and seed.
        tasks: names of the tasks.
        start: task that its initial parameters were trained on; None for the same task.
        devices: number of devices.
    """

    title: str
    run: Callable[[Setting], list[Result]]
    table: Callable[[str, list[Result]], rich.table.Table]
    fits: int
    tasks: tuple[str, ...] = (DOCUMENTATION, DIGITS)
    start: str | None = None
    devices: int = 1


PARTS = {
    "qat": Part(
        "Post-training quantization and quantization-aware training", qat.run, qat.table, qat.FITS
    ),
    "products": Part(
        "Quantized matrix multiplications", products.run, products.table, products.FITS
    ),
    "optimizers": Part("8- and 4-bit AdamW states", states.run, states.table, states.FITS),
    "qlora": Part(
        "QLoRA over an INT4 base", qlora.run, qlora.table, qlora.FITS, (SOURCE,), DOCUMENTATION
    ),
    "gradients": Part(
        "Quantized all-reduce of gradients",
        gradients.run,
        gradients.table,
        gradients.FITS,
        devices=gradients.DEVICES,
    ),
}


def all_tasks(config: BytesConfig = BytesConfig()) -> dict[str, Task | None]:  # noqa: B008 (frozen)
    """The tasks by name; None if the data of one are not installed."""
    return {
        DOCUMENTATION: text_task(DOCUMENTATION, documentation(), config),
        DIGITS: installed_digits(),
        SOURCE: text_task(SOURCE, source(), config),
    }


def run(
    tasks: dict[str, Task | None],
    parts: list[str],
    seeds: int,
    steps: int,
    show: Callable[[Any], None],
    progress: rich.progress.Progress,
) -> list[Result]:
    """Runs parts on tasks, shows a table after each, and returns all results."""
    chosen = {name: PARTS[name] for name in parts}
    wanted = {part.start or task for part in chosen.values() for task in part.tasks}
    starts = {name: task for name, task in tasks.items() if name in wanted and task is not None}
    fits = len(starts) + sum(_count(part, tasks) for part in chosen.values())
    bar = progress.add_task("", total=fits * seeds)

    def advance(share):
        progress.advance(bar, share)

    settings = {}
    for name, task in starts.items():
        progress.update(bar, description=f"float32, {name}")
        settings[name] = start(task, seeds, steps, advance)
        show(about(settings[name]))
    results = []
    for name, part in chosen.items():
        for of in part.tasks:
            if tasks[of] is None:
                continue
            progress.update(bar, description=f"{name}, {of}")
            found = part.run(dataclasses.replace(settings[part.start or of], task=tasks[of]))
            show(part.table(f"{part.title}: {of}", found))
            results += [{"part": name, "task": of, **r} for r in found]
    return results


def _count(part, tasks):
    return part.fits * sum(tasks[name] is not None for name in part.tasks)


def start(task: Task, seeds: int, steps: int, advance: Callable[[float], None]) -> Setting:
    """Float32 parameters of each seed, and their losses."""
    pretrained = {seed: pretrain(task, seed, steps, advance) for seed in range(seeds)}
    losses = {seed: held_out_loss(task, params) for seed, params in pretrained.items()}
    return Setting(task, pretrained, losses, steps, max(1, round(FINE * steps)), advance)


def about(setting: Setting) -> str:
    """A line that describes what was trained."""
    params = next(iter(setting.pretrained.values()))
    size = sum(x.size for x in jax.tree.leaves(params))
    return (
        f"{setting.task.name}: {size} parameters, {setting.steps} steps, "
        f"{setting.fine_steps} of fine-tuning, seeds {sorted(setting.pretrained)}."
    )


def run_all(arguments: Any, asked: list[str]) -> dict[str, Any]:
    """Runs parts of the suite, prints their tables, and returns what the JSON file holds."""
    console = rich.console.Console(width=max(120, rich.console.Console().width))
    tasks = all_tasks()
    not_run = missing(tasks, asked)
    parts = [name for name in asked if name not in not_run]
    before = time.perf_counter()
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as bar:
        results = run(tasks, parts, arguments.seeds, arguments.steps, console.print, bar)
    for name, why in not_run.items():
        console.print(f"Not run: {name}, {why}.")
    seconds = time.perf_counter() - before
    console.print(f"It took {seconds / 60:.0f} minutes.")
    options = {"seeds": arguments.seeds, "steps": arguments.steps, "seconds": seconds}
    return {"training": results, "not_run": not_run, **options}


def missing(tasks: dict[str, Task | None], asked: list[str]) -> dict[str, str]:
    """The tasks and parts that cannot be run here, and why not."""
    here, flag = jax.device_count(), "XLA_FLAGS=--xla_force_host_platform_device_count="
    without_data = [name for name, task in tasks.items() if task is None]
    too_wide = {name: n for name in asked if (n := PARTS[name].devices) > here}
    return dict.fromkeys(without_data, "for scikit-learn is not installed") | {
        name: f"which needs {n} devices and found {here}; on CPU, set {flag}{n}"
        for name, n in too_wide.items()
    }
