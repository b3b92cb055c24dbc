"""The native kernels beside plain loops: under sanitizers, and where instructions are emulated."""

import pathlib
import platform
import shutil
import subprocess

import pytest

from jaxquant.kernels import cpu

HERE = pathlib.Path(__file__).parent
KERNELS = HERE.parents[1] / "jaxquant/kernels/cpu"
ARM_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
# The file of each instruction set, its table of kernels, and what else it is compiled with.
AMX = "avx512", "kAmx", "-DJAXQUANT_AMX", "-DSAME_AS=kAvx512"
SOURCES = {
    "AMX": AMX,
    "AMX, emulated": (*AMX, f'-DJAXQUANT_TILES="{HERE / "emulated_tiles.h"}"'),
    "AVX512-VNNI": ("avx512", "kAvx512"),
    "AVX2": ("avx2", "kAvx2"),
    "NEON": ("neon", "kNeon"),
}
# All but the emulated tiles are instructions of AVX512.
NEEDED = {"AMX, emulated": "AVX512-VNNI"}
ON_THIS_PROCESSOR = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            NEEDED.get(name, name) not in cpu.instruction_sets(),
            reason=f"{NEEDED.get(name, name)} cannot be used here",
        ),
    )
    for name in SOURCES
]


def missing(*programs):
    absent = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


def compiled(folder, compiler, instructions, *options):
    """A program that compares the kernels of one instruction set with plain loops."""
    name, table, *others = SOURCES[instructions]
    source = f'-DSOURCE="{KERNELS / name}.cc"', f"-DKERNELS={table}", *others
    program = folder / name
    # Optimization would double the time to compile; kernels use the same intrinsics without it.
    command = [compiler, "-O0", "-std=c++17", f"-I{KERNELS}", *source, *options]
    subprocess.run([*command, str(HERE / "plain_loops.cc"), "-o", str(program)], check=True)
    return program


def assert_runs(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@missing(ARM_COMPILER, EMULATOR)
@pytest.mark.slow
def test_neon_matches_plain_loops_in_an_emulator(tmp_path):
    options = "-static", "-march=armv8.2-a+dotprod"
    program = compiled(tmp_path, ARM_COMPILER, "NEON", *options)
    assert_runs(EMULATOR, "-cpu", "max", program)


@pytest.mark.slow
@missing("g++")
@pytest.mark.skipif(platform.system() != "Linux", reason="the sanitizers are those of Linux")
@pytest.mark.parametrize("instructions", ON_THIS_PROCESSOR)
def test_sanitizers_find_nothing(tmp_path, instructions):
    options = "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    assert_runs(compiled(tmp_path, "g++", instructions, *options))


@pytest.mark.slow
@missing("g++")
@pytest.mark.skipif(platform.system() != "Linux", reason="the pages are those of Linux")
@pytest.mark.parametrize("instructions", ON_THIS_PROCESSOR)
def test_nothing_is_touched_beyond_the_ends_of_arrays(tmp_path, instructions):
    assert_runs(compiled(tmp_path, "g++", instructions, "-include", str(HERE / "guard_pages.h")))


@pytest.mark.slow
@missing("g++")
@pytest.mark.skipif(platform.system() != "Linux", reason="the sanitizers are those of Linux")
@pytest.mark.parametrize("instructions", ON_THIS_PROCESSOR)
def test_threads_do_not_race(tmp_path, instructions):
    threads = f'-DTHREADS="{KERNELS / "parallel.cc"}"', f"-I{HERE / 'threads'}", "-pthread"
    options = "-g1", "-fsanitize=thread", "-fno-sanitize-recover=all"
    assert_runs(compiled(tmp_path, "g++", instructions, *threads, *options))
