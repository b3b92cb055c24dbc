"""A plugin of pytest that writes which lines each test runs: `-p tests.mutation.record`.

Appends a line of JSON for each test that passed to a file in the folder that JAXQUANT_RECORD names,
one file per process: its name, its seconds, and the numbers of the lines by file of the package.
"""

import json
import os
import pathlib
import sys
import threading
import time

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = f"{ROOT / 'jaxquant'}{os.sep}"

_seen = set()


def _trace_lines(frame, event, argument):
    if event == "line":
        _seen.add((frame.f_code.co_filename, frame.f_lineno))
    return _trace_lines


def _trace(frame, event, argument):
    if frame.f_code.co_filename.startswith(PACKAGE):
        return _trace_lines
    return None


@pytest.fixture(autouse=True, scope="module")
def _compiles_again():
    """What a test of another module has compiled would not be traced again."""
    jax.clear_caches()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Traces fixtures, too."""
    _seen.clear()
    failed_before = item.session.testsfailed
    start = time.perf_counter()
    sys.settrace(_trace)
    threading.settrace(_trace)
    try:
        return (yield)
    finally:
        sys.settrace(None)
        threading.settrace(None)  # pyright: ignore[reportArgumentType]
        if item.session.testsfailed == failed_before:
            _write(item.nodeid, time.perf_counter() - start)


def _write(name, seconds):
    lines = {}
    for path, line in sorted(_seen):
        lines.setdefault(os.path.relpath(path, ROOT), []).append(line)
    folder = pathlib.Path(os.environ["JAXQUANT_RECORD"])
    row = {"test": name, "seconds": round(seconds, 3), "lines": lines}
    with (folder / f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
