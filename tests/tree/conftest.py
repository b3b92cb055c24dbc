import pytest


@pytest.fixture(autouse=True, scope="module")
def _less_optimization(quick_compilation):
    """XLA compiles quickly."""
