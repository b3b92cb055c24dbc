"""The native kernels for ARM, where a compiler for it and an emulator are installed."""

import pathlib
import shutil
import subprocess

import pytest

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
SOURCE = pathlib.Path(__file__).with_name("neon.cc")
missing = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]


@pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
def test_neon_matches_plain_loops_in_an_emulator(tmp_path):
    program = tmp_path / "neon"
    # Optimization would double the time to compile; kernels use the same intrinsics without it.
    options = ["-O0", "-std=c++17", "-static", "-march=armv8.2-a+dotprod"]
    subprocess.run([COMPILER, *options, str(SOURCE), "-o", str(program)], check=True)
    done = subprocess.run([EMULATOR, "-cpu", "max", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
