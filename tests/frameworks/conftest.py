import jax
import pytest


@pytest.fixture(autouse=True)
def usual_promotion():
    """The libraries rely on implicit promotion, which the other tests do not allow."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
