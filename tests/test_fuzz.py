"""Ten thousand damaged files load, or raise a ValueError that names the file.

`python -m tests.fuzz` tries as many as there is time for.
"""

import collections
import itertools
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from . import fuzz

# Files per reader, by what one costs.
COUNTS = {"own": 5000, "statistics": 1500, "gguf": 2500, "huggingface": 1000}


def test_every_reader_is_tested():
    assert set(COUNTS) == set(fuzz.READERS)
    assert sum(COUNTS.values()) == 10_000


@pytest.mark.parametrize("name", COUNTS)
def test_damaged_files_load_or_raise_a_valueerror_with_their_name(tmp_path, name):
    make, read = fuzz.READERS[name]
    files = itertools.islice(make(tmp_path, np.random.default_rng(0)), COUNTS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # Of NumPy, for scales of NaN.
        counts = collections.Counter(fuzz.outcome(read, path, what) for path, what in files)
    # Not every change matters, and most do.
    assert counts["raised"] > COUNTS[name] / 2
    assert counts["loaded"] > COUNTS[name] / 100


@pytest.mark.parametrize(
    "error, why",
    [
        (KeyError("a"), "because: KeyError: 'a'"),
        (ValueError("of what?"), "because: the error does not name the file: of what?"),
    ],
)
def test_other_errors_are_found(tmp_path, error, why):
    def read(path):
        raise error

    with pytest.raises(fuzz.UnexpectedError, match=why):
        fuzz.outcome(read, tmp_path / "a", "because")


def test_slow_files_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", -1)
    with pytest.raises(fuzz.UnexpectedError, match=r"because: reading took 0\.0 s"):
        fuzz.outcome(lambda path: None, tmp_path / "a", "because")


def test_the_file_that_raises_something_else_is_kept(tmp_path, monkeypatch, capsys):
    def read(path):
        raise LookupError(path.read_text())

    def make(folder, rng):
        (folder / "a.bin").write_text("damaged")
        yield folder / "a.bin", "because"

    monkeypatch.setitem(fuzz.READERS, "own", (make, read))
    monkeypatch.chdir(tmp_path)
    assert fuzz.main(["--reader", "own", "--seconds", "0"]) == 1
    assert "because: LookupError: damaged" in capsys.readouterr().err
    assert (tmp_path / "fuzz-own-a.bin").read_text() == "damaged"
    monkeypatch.setitem(fuzz.READERS, "own", (make, lambda path: jnp.ones(1)))
    assert fuzz.main(["--reader", "own", "--seconds", "0", "--seed", "3"]) == 0
    assert capsys.readouterr().out == '{"reader": "own", "seed": 3, "loaded": 1}\n'
