"""What tests of kernels for GPUs need."""

import jax
import pytest

needs_lowering = pytest.mark.skipif(
    jax.__version_info__ >= (0, 11),
    reason="JAX lowers Triton's kernels without a GPU up to 0.10 only, and then warns that they go",
)
