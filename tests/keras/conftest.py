import jax
import pytest
from jax._src import compiler  # There is no public way to compile quickly.


@pytest.fixture(autouse=True)
def keras_promotion():
    """Keras itself relies on implicit promotion and broadcasting."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _less_optimization(quick_compilation):
    """tests/ops tests results with full optimization; here XLA would take most of the time."""
    options = compiler.get_compile_options

    def without_fusion_emitters(*args, env_options_overrides=None, **kwargs):
        overrides = {**(env_options_overrides or {}), "xla_cpu_use_fusion_emitters": False}
        return options(*args, env_options_overrides=overrides, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", without_fusion_emitters)
        yield
