"""Building the package from source."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "jaxquant"
LIBRARY = "jaxquant/kernels/_cpu.so"
ROOT_FILES = (
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    ".pre-commit-config.yaml",
    "pyproject.toml",
    "setup.py",
)
# A file of each folder that a source distribution holds besides the package.
OF_EACH_FOLDER = (
    ".ci/smoke.py",
    ".github/workflows/tests.yml",
    "benchmarks/reliability.py",
    "docs/accuracy.svg",
    "tests/tree/data/int8.safetensors",
)
# Stands for a C++ compiler: writes the files that it is asked for, and what it was asked.
COMPILER = """#!/bin/sh
echo "$@" >> "{log}"
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && echo compiled > "$2"
  shift
done
"""
# jaxlib 0.10.2 itself needs this version.
NEWEST_GLIBC = (2, 27)


def built_wheel(folder, compiler):
    """The path of a wheel that is built from this tree by another compiler."""
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "bdist_wheel",
        "-d",
        folder,
        "-b",
        folder / "wheel",
    ]
    command += ["build", "--build-base", folder / "build"]
    environment = {**os.environ, "CC": str(compiler), "CXX": str(compiler)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture
def compiler(tmp_path):
    """A program that takes the place of a compiler; its log is beside it."""
    path = tmp_path / "compiler"
    path.write_text(COMPILER.format(log=tmp_path / "compiler.log"))
    path.chmod(0o755)
    return path


def test_an_install_without_a_compiler_goes_on_without_the_kernels(tmp_path):
    names = zipfile.ZipFile(built_wheel(tmp_path, "no-compiler")).namelist()
    assert "jaxquant/kernels/cpu/library.py" in names
    assert LIBRARY not in names


@pytest.mark.skipif(os.name != "posix", reason="the compiler is a shell script")
def test_one_wheel_serves_every_python(tmp_path, compiler):
    wheel = built_wheel(tmp_path, compiler)
    assert re.fullmatch(r"jaxquant-[^-]+-py3-none-(linux|macosx)_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert LIBRARY in names
    assert not [name for name in names if name.endswith((".cc", ".h"))]
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"jaxquant"}


@pytest.mark.skipif(os.name != "posix", reason="the compiler is a shell script")
def test_a_changed_source_is_linked_again(tmp_path, compiler):
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    sources = shutil.ignore_patterns("*.so", "*.py", "__pycache__")
    shutil.copytree(PACKAGE / "kernels", tmp_path / "jaxquant/kernels", ignore=sources)
    environment = {**os.environ, "CC": str(compiler), "CXX": str(compiler)}
    log = tmp_path / "compiler.log"

    def is_linked():
        log.write_text("")
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        return "-o build/lib." in log.read_text()

    assert is_linked()
    assert not is_linked()
    later = (tmp_path / LIBRARY).stat().st_mtime + 10
    os.utime(tmp_path / "jaxquant/kernels/cpu/avx2.cc", (later, later))
    assert is_linked()


def test_the_kernels_are_compiled_for_the_oldest_jaxlib():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (headers,) = (r for r in project["build-system"]["requires"] if r.startswith("jaxlib"))
    (jax,) = (r for r in project["project"]["dependencies"] if r.startswith("jax"))
    assert headers.removeprefix("jaxlib==") == jax.removeprefix("jax>=")


def test_a_source_distribution_holds_all_sources(tmp_path):
    built = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(PACKAGE, tmp_path / "jaxquant", ignore=built)
    for name in (*ROOT_FILES, *OF_EACH_FOLDER):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    sources = {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()}
    (tmp_path / "tests/__pycache__").mkdir()
    (tmp_path / "tests/__pycache__/conftest.cpython-311.pyc").touch()
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    archive = next(tmp_path.glob("dist/*.tar.gz"))
    with tarfile.open(archive) as file:
        packed = {pathlib.Path(*pathlib.Path(name).parts[1:]) for name in file.getnames()}
    assert pathlib.Path("jaxquant/kernels/cpu/common.h") in sources
    assert sources <= packed
    assert not [path for path in packed if path.suffix == ".pyc"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is of Linux")
def test_the_kernels_need_no_newer_glibc_than_jaxlib():
    if not (ROOT / LIBRARY).exists():
        pytest.skip("no kernels were built")
    # The names of the versions that the library is linked against.
    versions = re.findall(rb"\0GLIBC_(\d+)\.(\d+)", (ROOT / LIBRARY).read_bytes())
    assert versions
    assert max((int(major), int(minor)) for major, minor in versions) <= NEWEST_GLIBC
