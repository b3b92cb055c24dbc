"""Checks of batches that run through a model."""

from typing import Any

import jax


def check_arrays(batch: Any) -> None:
    """Checks that JAX accepts the leaves of a batch.

    Raises:
        ValueError: it does not.
    """
    try:
        jax.eval_shape(lambda _: None, batch)
    except TypeError as error:
        kinds = ", ".join(dict.fromkeys(type(x).__name__ for x in jax.tree.leaves(batch)))
        raise ValueError(
            f"batches must hold arrays of NumPy or JAX; got one of {kinds}. Convert tensors of "
            "other packages with np.asarray, and texts with a tokenizer."
        ) from error
