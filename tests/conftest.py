import functools
import gc
import importlib.util
import os

# Before JAX starts. LLVM without optimization, because most of the time goes into compilation;
# XLA's own passes still run. Flags of the environment win: `.ci/run` sets full optimization once.
# Eight devices, for the tests of sharding.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["KERAS_BACKEND"] = "jax"

import jax
import pytest
from jax._src import compiler  # There is no public way to compile quickly.

from benchmarks import tpu_compiler

from . import cases

# Implicit promotion and broadcasting are where quantized code goes silently wrong.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

IS_OPTIMIZED = os.environ["XLA_FLAGS"].count("xla_backend_optimization_level") > 1


def pytest_collection_modifyitems(items):
    """Brings tests of one config together, so that one worker alone compiles what they share."""
    rows = {name: place for place, name in enumerate(cases.CASES)}

    def place(item):
        in_brackets = item.name.partition("[")[2].rstrip("]")
        return rows.get(in_brackets, -1)

    items.sort(key=place)


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests of what is done with arrays, not of how they are computed.

    With full optimization, nothing is compiled in one way and used in the other: sums would differ
    in the last bit.
    """
    gc.collect()
    gc.freeze()  # Keras collects garbage whenever a variable goes, and would look at all again.
    if not IS_OPTIMIZED:
        yield
        return
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


# Folders and modules that test what is done with arrays, not how they are computed; and modules of
# these folders that test the latter, as test_prepare.py does, or for which LLVM rejects a cast of
# packed 4-bit floats.
QUICK = {"benchmarks", "calibration", "demo", "keras", "training", "tree"}
QUICK |= {"test_command_line.py", "test_docstrings.py", "test_documents.py"}
AS_USERS_COMPILE = ("test_fake_cast.py", "test_prepare.py", "test_psum.py")
_is_quick = False


@functools.cache
def _without_fusion_emitters():
    """The option that turns XLA's fusion emitters off, for jaxlib before 0.12, which needs them."""
    options: dict = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:  # No such option.
        return {}
    return options


@pytest.fixture(autouse=True, scope="module")
def _quick_folders(request):
    """Compiles without XLA's fusion emitters, which take half the time, where it can, and as above.

    Nothing is compiled in one way and used in the other: sums would differ in the last bit.
    """
    global _is_quick
    path, options = request.path, compiler.get_compile_options
    is_quick = not QUICK.isdisjoint((path.parent.name, path.name))
    is_quick = is_quick and path.name not in AS_USERS_COMPILE
    if is_quick != _is_quick:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", is_quick)
    _is_quick = is_quick
    gc.collect()
    gc.freeze()

    off = _without_fusion_emitters()  # Compiles itself, so not with the patch.

    def without_fusion_emitters(*args, env_options_overrides=None, **kwargs):
        overrides = {**(env_options_overrides or {}), **off}
        return options(*args, env_options_overrides=overrides, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if is_quick:
            patch.setattr(compiler, "get_compile_options", without_fusion_emitters)
        yield


@pytest.fixture(scope="session")
def libtpu():
    """The compiler for TPUs. It reads the environment when it is loaded, and only then."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install -e '.[tpu]'")
    before = dict(os.environ)
    tpu_compiler.prepare()
    try:
        tpu_compiler.device("v5e")
    except Exception as error:
        pytest.skip(f"libtpu describes no TPU: {error}")
    finally:
        os.environ.clear()
        os.environ.update(before)
