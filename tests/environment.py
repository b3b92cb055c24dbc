"""Environment variables, beside threads that read them."""

import contextlib
import os

import jax


@contextlib.contextmanager
def restored():
    """Restores the variables at the end, after the work of XLA's threads.

    They read variables while they compute, which the C library allows only while none is added or
    removed.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        jax.block_until_ready(jax.live_arrays())
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({k: v for k, v in before.items() if os.environ.get(k) != v})
