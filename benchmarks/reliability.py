"""What happens to files when processes are killed, disks are full, or others write the same file.

    python -m benchmarks.reliability

prints the table of docs/reliability.md. Each row is tried in separate processes; the first that
does not hold is an error. Linux or macOS; a read-only folder is tried only as root, which then
gives up its rights, and Orbax if it is installed.
"""

import argparse
import concurrent.futures
import contextlib
import os
import pathlib
import resource
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np

import jaxquant as jq

from .kills import (
    HAS_ORBAX,
    assert_whole,
    finished,
    kill_optimizer,
    kill_orbax,
    kill_quantize,
    kill_save,
    started,
    tree_of,
)

NOBODY = 65534
Check = Callable[[pathlib.Path, int], str]


def full_disk(folder: pathlib.Path, times: int) -> str:
    """Saves where a file cannot grow beyond a number of bytes, for many such numbers."""
    path = folder / "a"
    jq.save(path, tree_of(0))
    for limit in np.linspace(0, path.stat().st_size - 1, times):
        finished(_save_with_limit, path, int(limit))
        finished(assert_whole, path)
    assert os.listdir(folder) == ["a"]
    return "an OSError with the name of the file; the old file stays, and no other is left"


def _save_with_limit(path: pathlib.Path, limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with _raises(OSError, f"could not write: '{path}'"):
        jq.save(path, tree_of(1))


def read_only_folder(folder: pathlib.Path, times: int) -> str:
    """Saves into a folder that belongs to another user."""
    jq.save(folder / "a", tree_of(0))
    folder.chmod(0o755)
    for _ in range(times):
        finished(_save_as_nobody, folder / "a")
    assert os.listdir(folder) == ["a"]
    return "a PermissionError with the name of the folder, before any work; files can be loaded"


def _save_as_nobody(path: pathlib.Path) -> None:
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    for name in (path, path.with_name("new")):
        with _raises(PermissionError, f"{path.parent} cannot be written to"):
            jq.save(name, tree_of(1))
    assert_whole(path)


def two_writers(folder: pathlib.Path, times: int) -> str:
    """Two processes save the same file while a third loads it."""
    path = folder / "a"
    jq.save(path, tree_of(0))
    writers = [started(_save_often, path, first, times) for first in (1, 2)]
    finished(_load_often, path, times)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert os.listdir(folder) == ["a"]
    return "each load gives the tree of one of them; no other file is left"


def _save_often(path: pathlib.Path, first: int, times: int) -> None:
    for seed in range(first, first + 2 * times, 2):
        jq.save(path, tree_of(seed))


def _load_often(path: pathlib.Path, times: int) -> None:
    for _ in range(times):
        assert_whole(path)


def symbolic_links(folder: pathlib.Path, times: int) -> str:
    """Saves through links: to a file, to nothing, into a missing folder, and in a circle."""
    data = folder / "data"
    data.mkdir()
    for i in range(times):
        link, target = folder / f"link{i}", data / f"file{i}"
        if i % 2:
            jq.save(target, tree_of(0))
        link.symlink_to(target if i % 3 else f"data/file{i}")
        jq.save(link, tree_of(1))
        assert link.is_symlink()
        assert os.listdir(data) == [target.name]
        finished(assert_whole, target)
        target.unlink()
    (folder / "lost").symlink_to("nowhere/file")
    (folder / "one").symlink_to("two")
    (folder / "two").symlink_to("one")
    with _raises(FileNotFoundError, "is a link into"):
        jq.save(folder / "lost", tree_of(1))
    with _raises(OSError, "Too many levels of symbolic links"):
        jq.save(folder / "one", tree_of(1))
    return "the file that the link leads to is written, the link stays; other links are errors"


def threads(folder: pathlib.Path, times: int) -> str:
    """Eight threads quantize, save, load and multiply at once; each compares with one alone."""
    finished(_run_threads, folder, times)
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
    "kill -9 of `jaxquant quantize`, which is run again until it ends": (200, kill_quantize),
    "kill -9 while 8-bit optimizer states are saved after each step": (200, kill_optimizer),
    "the same with Orbax": (200, kill_orbax),
    "a full disk": (40, full_disk),
    "a folder that cannot be written to": (10, read_only_folder),
    "two processes that save one file while a third loads it": (200, two_writers),
    "symbolic links": (40, symbolic_links),
    "8 threads that quantize, save, load and multiply": (20, threads),
}


# Whether what a check needs is missing here.
LEFT_OUT: dict[Check, bool] = {read_only_folder: os.getuid() != 0, kill_orbax: not HAS_ORBAX}


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=sys.maxsize, help="times that a row is tried")
    options = parser.parse_args(arguments)
    print("| tried | times | what held |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as programs:
        # Processes compile what others have compiled only once.
        jax.config.update("jax_compilation_cache_dir", programs)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        for what, (times, check) in CHECKS.items():
            if not LEFT_OUT.get(check):
                print(row(what, min(times, options.most), check), flush=True)


def row(what: str, times: int, check: Check) -> str:
    """Tries a check so many times. Returns its row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        return f"| {what} | {times} | {check(pathlib.Path(folder), times)} |"


if __name__ == "__main__":
    main()
