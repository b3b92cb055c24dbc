"""Saving replaces a file completely or not at all, and removes only files of dead processes."""

import os
import resource
import signal
import stat
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import W8A8, load, save, tree
from jaxquant.tree import atomic, files
from jaxquant.tree.atomic import replacing
from jaxquant.tree.internal import check_target
from jaxquant.tree.tensor_file import open_tensors

from .trees import assert_equal_trees, normal, parameters


@pytest.mark.parametrize("is_relative", [True, False])
@pytest.mark.parametrize("is_dangling", [True, False])
def test_saving_through_a_symbolic_link_writes_its_target(tmp_path, is_relative, is_dangling):
    (tmp_path / "data").mkdir()
    target, link = tmp_path / "data" / "real", tmp_path / "link"
    if not is_dangling:
        save(target, {"old": np.ones(3)})
        target.chmod(0o640)
    link.symlink_to("data/real" if is_relative else target)
    save(link, {"new": jnp.ones(2)})
    assert link.is_symlink()
    assert_equal_trees(load(target), {"new": jnp.ones(2)})
    assert is_dangling or stat.S_IMODE(target.stat().st_mode) == 0o640
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["real"]
    assert {p.name for p in tmp_path.iterdir()} == {"data", "link"}


def test_the_error_names_a_link_into_a_missing_folder(tmp_path):
    (tmp_path / "link").symlink_to("nowhere/real")
    with pytest.raises(FileNotFoundError, match=r"link is a link into .*nowhere, which is not a f"):
        save(tmp_path / "link", {"a": np.ones(3)})


def test_a_loop_of_links_raises(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match=r"Too many levels of symbolic links.*/a'"):
        save(tmp_path / "a", {"a": np.ones(3)})
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("kind", ["device", "fifo", "link to a device"])
def test_saving_does_not_replace_devices_and_fifos(tmp_path, kind):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/null")
    path = {"device": "/dev/null", "fifo": tmp_path / "fifo"}.get(kind, tmp_path / "link")
    before = os.stat(path)
    for use in (lambda: save(path, {"a": np.ones(3)}), lambda: load(path)):
        with pytest.raises(ValueError, match=r"is a device, FIFO or socket .*; name a regular fil"):
            use()
    assert (os.stat(path).st_mode, os.stat(path).st_ino) == (before.st_mode, before.st_ino)


@pytest.mark.parametrize("has_old", [True, False])
def test_a_full_disk_raises_an_oserror_with_the_file_name(tmp_path, has_old):
    path = tmp_path / "a"
    if has_old:
        save(path, {"old": np.ones(3)})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        with pytest.raises(OSError, match=f"File too large; could not write: '{path}'"):
            save(path, {"big": np.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_without_write_permission_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(PermissionError, match=f"^{tmp_path} cannot be written to; choose another"):
        check_target(tmp_path / "a")


@pytest.mark.parametrize("name", ["n" * 250, "n" * 255, "é" * 127, "a[*]?b"])
def test_file_names_of_maximum_length_work(tmp_path, name):
    for value in (1, 2):
        save(tmp_path / name, {"a": value})
    assert load(tmp_path / name) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.slow
def test_the_next_save_of_a_file_removes_what_a_killed_save_left(tmp_path):
    script = (
        "import os, signal, sys\nimport numpy as np\nfrom jaxquant import save\n"
        "from jaxquant.tree import files\n"
        "def write(file, *rest):\n"
        "    file.write(b'half')\n    file.flush()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_tensors = write\nsave(sys.argv[1], {'a': np.ones(3)})\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a")]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    save(tmp_path / "b", {"b": 1})
    assert {p.name for p in tmp_path.iterdir()} == {left.name, "b"}
    save(tmp_path / "a", {"a": 1})
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_the_temporary_file_of_a_running_save_is_kept(tmp_path):
    path = tmp_path / "a"
    with replacing(path) as file:
        file.write(b"slow")
        file.flush()
        save(path, {"quick": 1})
        assert load(path) == {"quick": 1}
    assert path.read_bytes() == b"slow"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("other", ["locked", "removed"])
def test_a_new_file_removed_by_another_process_is_created_again(tmp_path, monkeypatch, other):
    lock, tries = atomic.lock, []

    def disturbed(descriptor, **options):
        tries.append([p for p in tmp_path.iterdir() if p.name.startswith(".")])
        if len(tries) > 1:
            return lock(descriptor, **options)
        for path in tries[0]:
            path.unlink()
        return other == "removed" and lock(descriptor, **options)

    monkeypatch.setattr(atomic, "lock", disturbed)
    save(tmp_path / "a", {"a": 1})
    assert len(tries) == 2
    assert load(tmp_path / "a") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_saving_works_without_file_locks_and_keeps_leftovers(tmp_path, monkeypatch):
    def unsupported(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(atomic.fcntl, "flock", unsupported)
    left = tmp_path / f"{atomic._temporary_prefix(tmp_path / 'a')}0.tmp"
    left.touch()
    save(tmp_path / "a", {"a": 1})
    assert {p.name for p in tmp_path.iterdir()} == {"a", left.name}


def test_a_private_file_stays_private_while_it_is_replaced(tmp_path):
    save(tmp_path / "a", {"a": 1})
    (tmp_path / "a").chmod(0o600)
    with replacing(tmp_path / "a"):
        modes = [stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()]
    assert modes == [0o600, 0o600]


def test_file_bytes_do_not_depend_on_dict_order(tmp_path):
    params = tree.quantize(parameters(), W8A8) | {"z": {3: 1, "x": [None], 1: (2.5, "text")}}

    def reverse(node):
        is_dict = type(node) is dict
        return {k: reverse(node[k]) for k in reversed(node)} if is_dict else node

    notes = {f"note {i}": str(i) for i in range(9)}
    save(tmp_path / "a", params, notes)
    save(tmp_path / "b", reverse(params), reverse(notes))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_replacing_a_file_does_not_affect_a_running_read(tmp_path):
    save(tmp_path / "a", {"a": normal(100), "b": np.zeros(1)})
    with open_tensors(tmp_path / "a") as file:
        save(tmp_path / "a", {"a": np.ones(3)})
        np.testing.assert_array_equal(file.read("a"), normal(100))


@pytest.mark.slow
def test_loading_during_a_save_returns_the_old_or_the_new_tree(tmp_path):
    versions = [{"a": np.full(n, n, np.float32), "n": n} for n in (10, 1000, 3000)]
    save(tmp_path / "a", versions[0])
    is_done = threading.Event()

    def replace():
        for i in range(150):
            save(tmp_path / "a", versions[i % 3])
        is_done.set()

    thread = threading.Thread(target=replace)
    thread.start()
    loads = 0
    while not is_done.is_set():
        found = load(tmp_path / "a")
        np.testing.assert_array_equal(found["a"], np.full(found["n"], found["n"], np.float32))
        loads += 1
    thread.join()
    assert loads > 10


def test_too_many_leaves_for_a_header_raise(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxquant.tree.tensor_file.MAX_HEADER_BYTES", 2000)
    with pytest.raises(ValueError, match=r"its header takes \d+ bytes, and safetensors reads 2000"):
        save(tmp_path / "a", [np.ones(1)] * 100)
    monkeypatch.setattr(files, "_MAX_CONTENT_BYTES", 200)
    with pytest.raises(ValueError, match=r"structure .* takes \d+ bytes; a file may have 200\. St"):
        save(tmp_path / "a", [np.ones(1)] * 100)
    assert list(tmp_path.iterdir()) == []


def test_a_tree_nested_too_deeply_raises(tmp_path):
    params = []
    params.append(params)
    with pytest.raises(ValueError, match=r"nested too deeply to save as .*/a; flatten it"):
        save(tmp_path / "a", params)
    assert list(tmp_path.iterdir()) == []
