import gc

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _no_garbage():
    """Keras collects garbage whenever a variable goes: what stays for good is passed over."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def keras_promotion():
    """Keras itself relies on implicit promotion and broadcasting."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        jax.config.update("jax_disable_most_optimizations", True)
        yield
