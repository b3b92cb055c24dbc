"""Runs tests in a copy of the repository in which one file is changed."""

import dataclasses
import functools
import math
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence

from .choose import Test
from .mutants import Mutant

PARTS = ("jaxquant", "tests", "benchmarks", "docs", ".ci", ".github", "*.md", "*.toml", "*.py")
# Of data, in bytes: a change of a size may ask for any amount.
MEMORY = 12 << 30
# Seconds of a core, beside those that tests took when they were recorded. Not of the clock: other
# programs may use the cores. A process that waits for ever is ended after so many times these.
STARTUP_SECONDS = 60
SLOWER = 3
WAITING = 30


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a change: by which test it was caught, how; None if all tests passed."""

    mutant: str
    layer: str
    kind: str
    caught: str | None
    tests: int


def copy_repository(root: pathlib.Path, target: pathlib.Path) -> None:
    """Copies what the tests need, with the native kernels that are built there."""
    target.mkdir(parents=True)
    for pattern in PARTS:
        for path in root.glob(pattern):
            if path.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, target / path.name, ignore=ignored)
            else:
                shutil.copy2(path, target)


def run_mutant(
    mutant: Mutant, layer: str, parts: Sequence[Sequence[Test]], folder: pathlib.Path
) -> Outcome:
    """Runs tests until one fails, on a change of a file of `folder`, which is undone afterwards."""
    path = folder / mutant.path
    source = path.read_text()
    caught, count = None, 0
    try:
        path.write_text(mutant.apply(source))
        for tests in filter(None, parts):
            seconds = STARTUP_SECONDS + SLOWER * sum(test.seconds for test in tests)
            caught = first_failure([test.name for test in tests], folder, seconds)
            count += len(tests)
            if caught is not None:
                break
    finally:
        path.write_text(source)
    return Outcome(str(mutant), layer, mutant.kind, caught, count)


def first_failure(names: Sequence[str], folder: pathlib.Path, seconds: float) -> str | None:
    """The test that fails first, or how the process ended; None if all pass.

    Args:
        names: of the tests, in the order in which they run.
        folder: a copy of the repository.
        seconds: of a core, after which the process is killed.

    Raises:
        RuntimeError: pytest ends in another way.
    """
    # A list of names may be longer than a command line.
    (folder / "names.txt").write_text("\n".join(names))
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", "--tb=no"]
    command += ["-p", "no:cacheprovider", "@names.txt"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=functools.partial(_set_limits, math.ceil(seconds)),
    )
    try:
        output, _ = process.communicate(timeout=WAITING * seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"waits for more than {WAITING * seconds:.0f} seconds"
    return _failure(process.returncode, output)


def _set_limits(seconds):
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def _failure(code, output):
    if code == 0:
        return None
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if "while loading conftest" in output:
        return "the import of the package"
    # The parameters of a test may have spaces.
    named = re.search(r"^(?:FAILED|ERROR) ([^\s[]+(?:\[.*?\])?)(?= - |$)", output, re.MULTILINE)
    if named is None:
        raise RuntimeError(f"pytest ended with {code}, without a test that failed:\n{output}")
    return named[1]
