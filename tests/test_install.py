"""Building the package from source."""

import importlib.machinery
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "jaxquant"
# jaxlib 0.10.2 itself needs this version.
NEWEST_GLIBC = (2, 27)


def test_an_install_without_a_compiler_goes_on_without_the_kernels(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    environment = {**os.environ, "CC": "no-compiler", "CXX": "no-compiler"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("_cpu*.so"))


def test_a_source_distribution_holds_all_sources(tmp_path):
    built = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(PACKAGE, tmp_path / "jaxquant", ignore=built)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    sources = {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()}
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    archive = next(tmp_path.glob("dist/*.tar.gz"))
    with tarfile.open(archive) as file:
        packed = {pathlib.Path(*pathlib.Path(name).parts[1:]) for name in file.getnames()}
    assert pathlib.Path("jaxquant/kernels/cpu/common.h") in sources
    assert sources <= packed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is of Linux")
def test_the_kernels_need_no_newer_glibc_than_jaxlib():
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    libraries = [PACKAGE / "kernels" / f"_cpu{suffix}" for suffix in suffixes]
    library = next((path for path in libraries if path.exists()), None)
    if library is None:
        pytest.skip("no kernels were built")
    # The names of the versions that the library is linked against.
    versions = re.findall(rb"\0GLIBC_(\d+)\.(\d+)", library.read_bytes())
    assert versions
    assert max((int(major), int(minor)) for major, minor in versions) <= NEWEST_GLIBC
