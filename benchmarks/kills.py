"""Processes that are killed with SIGKILL while they write files: see `reliability.py`."""

import collections
import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

import jaxquant as jq
from jaxquant import __main__ as command_line

HAS_ORBAX = importlib.util.find_spec("orbax") is not None
if HAS_ORBAX:
    # An optional package. It takes seconds to import, which children inherit.
    import orbax.checkpoint as ocp

# Children inherit the imported modules. JAX starts its threads with the first array, which is why
# this process makes none.
FORK = multiprocessing.get_context("fork")


def tree_of(seed: int) -> dict[str, Any]:
    """A tree of NumPy arrays that takes a few milliseconds to write."""
    random = np.random.default_rng(seed)
    return {"seed": seed, "w": [random.normal(size=(128, 512)).astype(np.float32)] * 3}


def is_whole(tree: dict[str, Any]) -> bool:
    """Whether this is one of the trees of `tree_of`, and not a mixture."""
    return all(
        np.array_equal(x, y) for x, y in zip(tree["w"], tree_of(tree["seed"])["w"], strict=True)
    )


def assert_whole(path: pathlib.Path) -> None:
    """Raises if a file does not hold one of the trees of `tree_of`."""
    assert is_whole(jq.load(path))


def started(run: Callable[..., Any], *args: Any) -> Any:
    """Another process, which runs a function."""
    process = FORK.Process(target=run, args=args)
    process.start()
    return process


def finished(run: Callable[..., Any], *args: Any) -> None:
    """Runs a function in another process. Raises if that fails."""
    process = started(run, *args)
    process.join()
    assert process.exitcode == 0, f"{run.__name__}{args} ended with {process.exitcode}"


def _kill(process: Any) -> None:
    process.kill()
    process.join()


def _wait_for(process: Any, is_there: Callable[[], Any]) -> None:
    while not is_there():
        assert process.is_alive(), f"ended with {process.exitcode}"
        time.sleep(0.001)


def _leftovers(folder: pathlib.Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".jaxquant")]


def _save_again_and_again(path: pathlib.Path) -> None:
    for seed in range(1, sys.maxsize):
        jq.save(path, tree_of(seed))


def kill_save(folder: pathlib.Path, times: int) -> str:
    """Saves a file over itself until it is killed; then loads it."""
    path, random, unfinished = folder / "a", np.random.default_rng(0), 0
    jq.save(path, tree_of(0))
    for _ in range(times):
        process = started(_save_again_and_again, path)
        time.sleep(random.uniform(0.001, 0.06))
        _kill(process)
        unfinished += len(_leftovers(folder)) > 0
        finished(assert_whole, path)
        jq.save(path, tree_of(0))
        assert not _leftovers(folder)
    return f"the old or the new tree; the next save removes an unfinished file ({unfinished})"


def kill_optimizer(folder: pathlib.Path, times: int) -> str:
    """Trains with 8-bit optimizer states and saves after each step, until it is killed."""
    path, kept, random, unfinished = folder / "a", folder / "kept", np.random.default_rng(1), 0
    kept.mkdir()
    for i in range(times):
        process = started(_train_and_save, path)
        _wait_for(process, path.exists)
        time.sleep(random.uniform(0, 0.3))
        _kill(process)
        unfinished += len(_leftovers(folder)) > 0
        path.rename(kept / str(i))
    finished(_assert_steps, kept)
    return f"parameters and states of one step; an unfinished file beside them ({unfinished})"


def _trained() -> Iterator[dict[str, Any]]:
    """The number of each step, and the parameters and the states after it."""
    optimizer = jq.training.quantized_state(optax.adam(1e-3))
    params = {"w": jnp.ones((64, 256))}
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    for number in range(sys.maxsize):
        params, state = step(params, state)
        yield {"step": number, "params": params, "state": state}


def _train_and_save(path: pathlib.Path) -> None:
    for reached in _trained():
        jq.save(path, reached)


def _assert_steps(folder: pathlib.Path) -> None:
    """Compares each file with the step that it names."""
    by_step = collections.defaultdict(list)
    for path in folder.iterdir():
        by_step[jq.load(path)["step"]].append(path)
    for wanted in itertools.islice(_trained(), max(by_step) + 1):
        for path in by_step[wanted["step"]]:
            _assert_same(jq.load(path, like=wanted), wanted)


def _assert_same(found: Any, wanted: dict[str, Any]) -> None:
    assert jax.tree.all(jax.tree.map(np.array_equal, found, wanted)), wanted["step"]


def kill_orbax(folder: pathlib.Path, times: int) -> str:
    """The same with Orbax, which keeps the last two steps and writes in the background."""
    random, unfinished = np.random.default_rng(2), 0
    for i in range(times):
        path = folder / str(i)
        process = started(_train_and_save_by_orbax, path)
        _wait_for(process, (path / "0").exists)
        time.sleep(random.uniform(0, 0.5))
        _kill(process)
        unfinished += any(not found.name.isdigit() for found in path.iterdir())
    finished(_assert_steps_of_orbax, folder)
    return f"those of the last finished step; an unfinished step beside it ({unfinished})"


def _manager(path: pathlib.Path) -> Any:
    return ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(max_to_keep=2))


def _train_and_save_by_orbax(path: pathlib.Path) -> None:
    manager = _manager(path)
    for reached in _trained():
        manager.save(reached["step"], args=ocp.args.StandardSave(reached))


def _assert_steps_of_orbax(folder: pathlib.Path) -> None:
    steps = _trained()
    reached = [next(steps)]
    for path in folder.iterdir():
        with _manager(path) as manager:
            latest = manager.latest_step()
            while len(reached) <= latest:
                reached.append(next(steps))
            wanted = reached[latest]
            found = manager.restore(latest, args=ocp.args.StandardRestore(wanted))
        _assert_same(found, wanted)


def kill_quantize(folder: pathlib.Path, times: int) -> str:
    """Runs `jaxquant quantize` until it is killed, and again until it ends."""
    source, target, wanted = (folder / name for name in ("source", "target", "wanted"))
    random, killed, continued, ended = np.random.default_rng(3), 0, 0, 0
    arrays = {str(i): random.normal(size=(512, 512)).astype(np.float32) for i in range(24)}
    # A file of another library is quantized tensor by tensor.
    safetensors.numpy.save_file(arrays, source)
    finished(_quantize, source, wanted)
    while killed < times:
        before = _tensors_in_journal(target)
        process = started(_quantize, source, target)
        # Every third process is killed while it starts.
        while killed % 3 and process.is_alive() and _tensors_in_journal(target) == before:
            time.sleep(0.001)
        process.join(random.uniform(0, 0.5))
        is_killed = process.is_alive()
        _kill(process)
        assert is_killed or process.exitcode == 0, process.exitcode
        killed += is_killed
        if target.exists():
            assert target.read_bytes() == wanted.read_bytes()
            target.unlink()
            ended += 1
        else:
            assert _tensors_in_journal(target) >= before, "finished tensors were thrown away"
            continued += before > 0
    held = f"goes on after the last finished tensor ({continued});"
    return f"{held} ends with the bytes of a process that nobody killed ({ended})"


def _tensors_in_journal(target: pathlib.Path) -> int:
    """How many tensors of an unfinished file are finished."""
    try:
        # The first line is the task.
        return max(pathlib.Path(f"{target}.partial", "journal").read_bytes().count(b"\n") - 1, 0)
    except FileNotFoundError:
        return 0


def _quantize(source: pathlib.Path, target: pathlib.Path) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        arguments = ["quantize", str(source), str(target), "--scheme", "W4A16"]
        sys.exit(command_line.main([*arguments, "--rule", "*=W4A16"]))
