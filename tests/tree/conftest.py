import pytest


@pytest.fixture(autouse=True)
def _less_optimization(quick_compilation):
    """XLA compiles quickly."""
