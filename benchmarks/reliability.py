"""What happens to files when processes are killed, disks are full, or others write the same file.

    python -m benchmarks.reliability

prints the table of docs/reliability.md, in about four minutes on two cores. Each row is tried in
separate processes; the first that does not hold is an error. Linux or macOS; a read-only folder is
tried only as root, which then gives up its rights.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import pathlib
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxquant as jq

# Children inherit the imported modules. JAX starts its threads with the first array, which is why
# this process makes none.
FORK = multiprocessing.get_context("fork")
NOBODY = 65534
Check = Callable[[pathlib.Path, int], str]


def _tree(seed: int) -> dict[str, Any]:
    """A tree of NumPy arrays that takes a few milliseconds to write."""
    random = np.random.default_rng(seed)
    return {"seed": seed, "w": [random.normal(size=(128, 512)).astype(np.float32)] * 3}


def _is_whole(tree: dict[str, Any]) -> bool:
    """Whether this is one of the trees of `_tree`, and not a mixture."""
    return all(
        np.array_equal(x, y) for x, y in zip(tree["w"], _tree(tree["seed"])["w"], strict=True)
    )


def _started(run: Callable[..., Any], *args: Any) -> Any:
    process = FORK.Process(target=run, args=args)
    process.start()
    return process


def _finished(run: Callable[..., Any], *args: Any) -> None:
    """Runs a function in another process. Raises if that fails."""
    process = _started(run, *args)
    process.join()
    assert process.exitcode == 0, f"{run.__name__}{args} ended with {process.exitcode}"


def _kill(process: Any) -> None:
    process.kill()
    process.join()


def _leftovers(folder: pathlib.Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".jaxquant")]


def _save_again_and_again(path: pathlib.Path, first: int = 1) -> None:
    for seed in range(first, sys.maxsize):
        jq.save(path, _tree(seed))


def kill_save(folder: pathlib.Path, times: int) -> str:
    """Saves a file over itself until it is killed; then loads it."""
    path, random, unfinished = folder / "a", np.random.default_rng(0), 0
    jq.save(path, _tree(0))
    for _ in range(times):
        process = _started(_save_again_and_again, path)
        time.sleep(random.uniform(0.001, 0.06))
        _kill(process)
        unfinished += len(_leftovers(folder)) > 0
        _finished(_assert_whole, path)
        jq.save(path, _tree(0))
        assert not _leftovers(folder)
    return f"the old or the new tree; the next save removes an unfinished file ({unfinished})"


def _assert_whole(path: pathlib.Path) -> None:
    assert _is_whole(jq.load(path))


def kill_optimizer(folder: pathlib.Path, times: int) -> str:
    """Trains with 8-bit optimizer states and saves after each step, until it is killed."""
    path, random = folder / "a", np.random.default_rng(1)
    for _ in range(times):
        path.unlink(missing_ok=True)
        process = _started(_train_and_save, path)
        while not path.exists():
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(random.uniform(0.05, 0.5))
        _kill(process)
        _finished(_assert_step, path)
    return "parameters and states of one and the same step each time"


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


def _assert_step(path: pathlib.Path) -> None:
    wanted = next(itertools.islice(_trained(), jq.load(path)["step"], None))
    same = jax.tree.map(np.array_equal, jq.load(path, like=wanted), wanted)
    assert all(jax.tree.leaves(same)), wanted["step"]


def kill_quantize(folder: pathlib.Path, times: int) -> str:
    """Quantizes a file to a file, killed after a few tensors and begun again until it ends."""
    source, target, wanted = (folder / name for name in ("source", "target", "wanted"))
    random, continued = np.random.default_rng(2), 0
    arrays = {str(i): random.normal(size=(512, 512)).astype(np.float32) for i in range(24)}
    jq.save(source, arrays)
    _finished(_quantize, source, wanted)
    for _ in range(times):
        target.unlink(missing_ok=True)
        while not target.exists():
            continued += _tensors_in_journal(target) > 0
            _quantize_some(source, target, int(random.integers(1, 13)))
        assert target.read_bytes() == wanted.read_bytes()
    assert continued, "every process ended before it was killed"
    return "goes on after the last tensor; the bytes of a process that nobody killed"


def _quantize_some(source: pathlib.Path, target: pathlib.Path, count: int) -> None:
    """Quantizes in another process, which is killed after so many more tensors."""
    before = done = _tensors_in_journal(target)
    process = _started(_quantize, source, target)
    while process.is_alive() and done < before + count and not target.exists():
        time.sleep(0.001)
        done = _tensors_in_journal(target)
        assert done >= before or target.exists(), "finished tensors were thrown away"
    if not target.exists():
        _kill(process)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode


def _tensors_in_journal(target: pathlib.Path) -> int:
    """How many tensors of an unfinished file are finished."""
    try:
        # The first line is the task.
        return max(pathlib.Path(f"{target}.partial", "journal").read_bytes().count(b"\n") - 1, 0)
    except FileNotFoundError:
        return 0


def _quantize(source: pathlib.Path, target: pathlib.Path) -> None:
    rules = [jq.Rule("*", jq.W4A16, axis=0)]
    jq.checkpoints.write_quantized(target, jq.checkpoints.open(source), rules)


def full_disk(folder: pathlib.Path, times: int) -> str:
    """Saves where a file cannot grow beyond a number of bytes, for many such numbers."""
    path = folder / "a"
    jq.save(path, _tree(0))
    for limit in np.linspace(0, path.stat().st_size - 1, times):
        _finished(_save_with_limit, path, int(limit))
        _finished(_assert_whole, path)
    assert os.listdir(folder) == ["a"]
    return "an OSError with the name of the file; the old file stays, and no other is left"


def _save_with_limit(path: pathlib.Path, limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with _raises(OSError, f"could not write: '{path}'"):
        jq.save(path, _tree(1))


def read_only_folder(folder: pathlib.Path, times: int) -> str:
    """Saves into a folder that belongs to another user."""
    jq.save(folder / "a", _tree(0))
    folder.chmod(0o755)
    for _ in range(times):
        _finished(_save_as_nobody, folder / "a")
    assert os.listdir(folder) == ["a"]
    return "a PermissionError with the name of the folder, before any work; files can be loaded"


def _save_as_nobody(path: pathlib.Path) -> None:
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    for name in (path, path.with_name("new")):
        with _raises(PermissionError, f"{path.parent} cannot be written to"):
            jq.save(name, _tree(1))
    _assert_whole(path)


def two_writers(folder: pathlib.Path, times: int) -> str:
    """Two processes save the same file while a third loads it."""
    path = folder / "a"
    jq.save(path, _tree(0))
    writers = [_started(_save_often, path, first, times) for first in (1, 2)]
    _finished(_load_often, path, times)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert os.listdir(folder) == ["a"]
    return "each load gives the tree of one of them; no other file is left"


def _save_often(path: pathlib.Path, first: int, times: int) -> None:
    for seed in range(first, first + 2 * times, 2):
        jq.save(path, _tree(seed))


def _load_often(path: pathlib.Path, times: int) -> None:
    for _ in range(times):
        _assert_whole(path)


def symbolic_links(folder: pathlib.Path, times: int) -> str:
    """Saves through links: to a file, to nothing, into a missing folder, and in a circle."""
    data = folder / "data"
    data.mkdir()
    for i in range(times):
        link, target = folder / f"link{i}", data / f"file{i}"
        if i % 2:
            jq.save(target, _tree(0))
        link.symlink_to(target if i % 3 else f"data/file{i}")
        jq.save(link, _tree(1))
        assert link.is_symlink()
        assert os.listdir(data) == [target.name]
        _finished(_assert_whole, target)
        target.unlink()
    (folder / "lost").symlink_to("nowhere/file")
    (folder / "one").symlink_to("two")
    (folder / "two").symlink_to("one")
    with _raises(FileNotFoundError, "is a link into"):
        jq.save(folder / "lost", _tree(1))
    with _raises(OSError, "Too many levels of symbolic links"):
        jq.save(folder / "one", _tree(1))
    return "the file that the link leads to is written, the link stays; other links are errors"


def threads(folder: pathlib.Path, times: int) -> str:
    """Eight threads quantize, save, load and multiply at once; each compares with one alone."""
    _finished(_run_threads, folder, times)
    return "the bits of one thread alone"


def _run_threads(folder: pathlib.Path, times: int) -> None:
    schemes = [jq.W8A8, jq.W4A16, jq.NF4A16, jq.MXFP4A16]
    kernel = jax.random.normal(jax.random.key(0), (128, 64))
    x = jax.random.normal(jax.random.key(1), (4, 128))

    def work(path: pathlib.Path, scheme: jq.Scheme) -> np.ndarray:
        jq.save(path, jq.tree.quantize({"kernel": kernel}, scheme))
        return np.asarray(jax.jit(jq.matmul)(x, jq.load(path)["kernel"]))

    wanted = [work(folder / "alone", scheme) for scheme in schemes]
    barrier = threading.Barrier(8)

    def compare(number: int) -> None:
        barrier.wait()
        for i in range(times):
            which = (number + i) % len(schemes)
            got = work(folder / f"{number % 4}-{which}", schemes[which])
            np.testing.assert_array_equal(got, wanted[which])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(compare, range(8)))


@contextlib.contextmanager
def _raises(kind: type[Exception], text: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        if text in str(error):
            return
        raise
    raise AssertionError(f"no {kind.__name__} with {text!r}")


# What is tried, how often, and the function that tries it.
CHECKS: dict[str, tuple[int, Check]] = {
    "kill -9 during `save`": (200, kill_save),
    "kill -9 while 8-bit optimizer states are saved after each step": (40, kill_optimizer),
    "kill -9 during `checkpoints.write_quantized`, until it ends": (20, kill_quantize),
    "a full disk": (40, full_disk),
    "a folder that cannot be written to": (10, read_only_folder),
    "two processes that save one file while a third loads it": (200, two_writers),
    "symbolic links": (40, symbolic_links),
    "8 threads that quantize, save, load and multiply": (20, threads),
}


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=sys.maxsize, help="times that a row is tried")
    options = parser.parse_args(arguments)
    print("| tried | times | what held |\n|---|---|---|")
    for what, (times, check) in CHECKS.items():
        if check is read_only_folder and os.getuid() != 0:
            continue
        times = min(times, options.most)
        with tempfile.TemporaryDirectory() as folder:
            held = check(pathlib.Path(folder), times)
        print(f"| {what} | {times} | {held} |", flush=True)


if __name__ == "__main__":
    main()
