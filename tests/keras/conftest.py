from typing import Any

import jax
import jax.export
import numpy as np
import pytest
from keras.src.backend import jax as backend  # Public functions compile for each shape.

on_jax: Any = backend
random = on_jax.random
# Keras 3.16 has it elsewhere.
numpy = on_jax.numpy if hasattr(on_jax, "numpy") else on_jax.ops.numpy


@pytest.fixture(autouse=True)
def keras_promotion():
    """Keras itself relies on implicit promotion and broadcasting."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _initial_values_from_numpy():
    """XLA compiles them for each shape, random numbers for 0.3 s each."""

    def drawn(draw, original):
        def run(shape, *args, seed=None, **kwargs):
            seed = random.jax_draw_seed(seed)
            try:
                rng = np.random.default_rng(np.asarray(seed))
            except jax.errors.TracerArrayConversionError:  # Inside of jit.
                return original(shape, *args, seed=seed, **kwargs)
            return draw(rng, shape, *args, **kwargs)

        return run

    def normal(rng, shape, mean=0.0, stddev=1.0, dtype=None):
        return jax.numpy.asarray(rng.normal(mean, stddev, shape).astype(dtype or "float32"))

    def uniform(rng, shape, minval=0.0, maxval=1.0, dtype=None):
        return jax.numpy.asarray(rng.uniform(minval, maxval, shape).astype(dtype or "float32"))

    def full(value):
        def run(shape, dtype=None):
            dtype = dtype or "float32"
            if any(map(jax.export.is_symbolic_dim, np.atleast_1d(np.array(shape, object)))):
                return jax.numpy.full(shape, value, dtype)
            return jax.numpy.asarray(np.full(shape, value, dtype))

        return run

    with pytest.MonkeyPatch.context() as patch:
        for draw in (normal, uniform):
            name = draw.__name__
            patch.setattr(random, name, drawn(draw, getattr(random, name)))
        patch.setattr(numpy, "zeros", full(0))
        patch.setattr(numpy, "ones", full(1))
        yield
