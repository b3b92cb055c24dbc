"""Atomic file writes: a file is replaced completely or not at all."""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yields a new file, which takes the place of `path` once it is written and on disk.

    Until then it has a temporary name in the same folder, and is locked. What earlier processes
    left there, when they were killed while they wrote `path`, is not locked, and is removed. If
    `path` is a symbolic link, the file that it leads to is replaced.

    Raises:
        OSError: the file cannot be written; `path` is then as it was.
    """
    target = Path(os.path.realpath(path))
    prefix = _temporary_prefix(target)
    _remove_leftovers(target.parent, prefix)
    mode = target.stat().st_mode if target.exists() else None
    # What is replaced may be private.
    temporary, descriptor = _create(target.parent, prefix, 0o666 if mode is None else 0o600)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            if mode is not None:
                os.fchmod(descriptor, mode & 0o7777)
            os.fsync(descriptor)
            os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:
            raise OSError(error.errno, f"{error.strerror}; could not write", str(path)) from error
        raise
    _sync_folder(target.parent)


@contextlib.contextmanager
def creating_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new folder, which is renamed to `path` once its files are written.

    Until then it is locked. Folders that earlier processes left there, when they were killed while
    they wrote `path`, are not locked, and are removed.

    Raises:
        FileExistsError: there is something other than an empty folder at `path`.
        OSError: the folder cannot be created; there is nothing at `path` then.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{path} exists; choose a new folder, or remove it.")
    prefix = _temporary_prefix(target)
    for leftover in target.parent.glob(f"{prefix}*.folder"):
        with contextlib.suppress(OSError), _locked_folder(leftover, unsupported=False):
            shutil.rmtree(leftover)
    temporary = target.parent / f"{prefix}{secrets.token_hex(4)}.folder"
    temporary.mkdir()
    try:
        with _locked_folder(temporary, unsupported=True):
            yield temporary
            os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(target.parent)


@contextlib.contextmanager
def _locked_folder(folder: Path, *, unsupported: bool) -> Iterator[None]:
    """Holds a lock; raises BlockingIOError if another process does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not lock(descriptor, unsupported=unsupported):
            raise BlockingIOError(f"{folder} is being written by another process.")
        yield
    finally:
        os.close(descriptor)


def _temporary_prefix(target):
    # Of one length, because the target's name may be as long as a name can be.
    return f".jaxquant-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"


def _create(folder, prefix, mode):
    """A new file, locked: its path and descriptor."""
    while True:
        temporary = folder / f"{prefix}{secrets.token_hex(4)}.tmp"
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(temporary, flags, mode)
        # Another process may take it for a leftover until it is locked.
        is_ours = lock(descriptor, unsupported=True) and temporary.exists()
        if is_ours:
            return temporary, descriptor
        os.close(descriptor)


def _remove_leftovers(folder, prefix):
    for leftover in folder.glob(f"{prefix}*.tmp"):
        # One that is another's, or already gone, is left.
        with contextlib.suppress(OSError), open(leftover, "rb+") as file:
            if lock(file.fileno(), unsupported=False):
                leftover.unlink()


def lock(descriptor: int, *, unsupported: bool) -> bool:
    """Whether the file is locked by this now; `unsupported` where there are no locks."""
    if fcntl is None:
        return unsupported
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return unsupported
    return True


def _sync_folder(folder):
    """The name, too, must outlive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
