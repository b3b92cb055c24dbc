import gc
import importlib.util
import os
import shutil
import tempfile

# Before JAX starts. LLVM without optimization and in one piece, because most of the time goes into
# compilation; XLA's own passes still run. Flags of the environment win: `.ci/run` sets full
# optimization once. Eight devices, for the tests of sharding.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1 "
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)
# What one process has compiled, others load: pytest's workers, and the commands that tests start.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "JAX_COMPILATION_CACHE_DIR"
) or tempfile.mkdtemp(prefix=f"jaxquant-tests-{os.getpid()}-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["KERAS_BACKEND"] = "jax"

import jax
import pytest
from jax._src import compiler, core  # There is no public way to compile quickly, or less.

from benchmarks import tpu_compiler
from jaxquant.kernels import cpu
from jaxquant.kernels.cpu.library import INSTRUCTIONS

from . import cases, environment, selection

# Implicit promotion and broadcasting are where quantized code goes silently wrong.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

IS_OPTIMIZED = os.environ["XLA_FLAGS"].count("xla_backend_optimization_level") > 1


def _turn_fusion_emitters_off():
    """Compiles without XLA's fusion emitters, which take two thirds of the time.

    But not for 4-bit floats, which XLA rounds wrongly without them, and not for jaxlib from 0.12,
    which always has them. `.ci/run` compares what they compute with NumPy and with eager calls.
    """
    off: dict = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=off)
    except jax.errors.JaxRuntimeError:  # No such option.
        return
    compile_and_load = compiler.backend_compile_and_load

    def compile_without(backend, module, devices, options, host_callbacks):
        if backend.platform == "cpu" and "f4E2M1FN" not in str(module):
            options.env_option_overrides = [*options.env_option_overrides, *off.items()]
        return compile_and_load(backend, module, devices, options, host_callbacks)

    compiler.backend_compile_and_load = compile_without


if not IS_OPTIMIZED:
    _turn_fusion_emitters_off()
# Compilation leaves many objects behind that live on. Python would look at them again and again.
gc.set_threshold(50_000, 20, 100)
# `jnp.asarray` of a NumPy array would compile a copy for each shape.
core.stage_p.def_impl(jax.device_put)


# Which native kernels are tested.
FOUND = cpu.instruction_sets()
NATIVE = f"native kernels: {', '.join(FOUND) or f'none, because {cpu.unavailable()}'}"
NATIVE += f"; not tested here: {', '.join(name for name in INSTRUCTIONS if name not in FOUND)}"


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(NATIVE)


def pytest_unconfigure():
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if f"jaxquant-tests-{os.getpid()}-" in folder:  # This process made it.
        shutil.rmtree(folder, ignore_errors=True)


def pytest_addoption(parser):
    text = "run all tests, those marked `slow` too, and all rows of those marked `some_rows`"
    parser.addoption("--all", action="store_true", help=text)
    text = "run at most this many rows of each parametrized test, spread over its table"
    parser.addoption("--most-rows", type=int, metavar="N", help=text)


def pytest_configure(config):
    marks = {
        "slow": "takes many seconds; runs with --all, -m slow, or when it is asked for by name",
        "some_rows(n)": "runs n rows, spread over the table, since each compiles programs",
    }
    for name, text in marks.items():
        config.addinivalue_line("markers", f"{name}: {text}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Chooses what is run, as the marks say.

    Brings tests of one config together, so that one worker alone compiles what they share.
    """
    is_named = config.option.keyword or any("::" in str(a) for a in config.args)
    if not (is_named or config.option.all):
        options = config.option
        kept = set(selection.to_run(items, "slow" in options.markexpr, options.most_rows))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    rows = {name: place for place, name in enumerate(cases.CASES)}

    def place(item):
        in_brackets = item.name.partition("[")[2].rstrip("]")
        return rows.get(in_brackets, -1)

    items.sort(key=place)


# Folders and modules that test what is done with arrays, not how they are computed. These are
# compiled without optimization even where `.ci/run` asks for it.
QUICK = {"benchmarks", "calibration", "demo", "explain", "jaxprs", "keras", "lift", "tree"}
QUICK |= {"test_command_line.py", "test_docstrings.py", "test_documents.py"}


@pytest.fixture(autouse=True, scope="module")
def _quick_folders(request):
    if not QUICK.isdisjoint((request.path.parent.name, request.path.name)):
        request.getfixturevalue("quick_compilation")
    gc.collect()
    gc.freeze()  # Keras collects garbage whenever a variable goes, and would look at all again.


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules like those of `QUICK`.

    Nothing is compiled in one way and used in the other: sums would differ in the last bit.
    """
    if not IS_OPTIMIZED:
        yield
        return
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture(scope="session")
def libtpu():
    """The compiler for TPUs. It reads the environment when it is loaded, and only then."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install -e '.[tpu]'")
    with environment.restored():
        tpu_compiler.prepare()
        try:
            tpu_compiler.device("v5e")
        except Exception as error:
            pytest.skip(f"libtpu describes no TPU: {error}")
