"""`einsum` of two operands for training, quantized forward and in both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .delayed import DelayedScaling
from .product import check_product
from .product_config import ProductConfig
from .train_products import train_products


def einsum(
    subscripts: str,
    lhs: jax.Array | np.ndarray,
    rhs: jax.Array | np.ndarray,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    config: ProductConfig,
    key: jax.Array | None = None,
    scaling: DelayedScaling | None = None,
) -> jax.Array:
    """`jax.numpy.einsum` of two float arrays, quantized forward and in both gradients.

        out[output labels] = sum over the labels that both have and out does not of Q(lhs) Q(rhs)

    It is the `dot_general` that `jax.numpy.einsum` makes of it, with config.rhs for rhs.

    Args:
        subscripts: as for `jax.numpy.einsum`, as one string, such as "btd,dhk->bthk".
        lhs, rhs: floating-point arrays.
        precision, preferred_element_type, config, key, scaling: as for `dot_general`.

    Returns:
        Array with one axis per output label.

    Raises:
        ValueError: no label is summed over that both operands have, a label of rhs alone is summed
            over or repeated, the subscripts do not fit the operands (from `jax.numpy.einsum`), or
            as for `dot_general`.

    Gradients and error: as for `dot_general`.
    Source: Wortsman et al. 2023 (SwitchBack), arXiv:2304.13013.

    Example:
        >>> x, w = jnp.ones((2, 3, 8)), jnp.ones((8, 2, 4))
        >>> jq.training.einsum("btd,dhk->bthk", x, w, config=jq.training.SWITCHBACK).shape
        (2, 3, 2, 4)
    """
    check_product(lhs, rhs, config, key, scaling)
    _check_labels(subscripts)

    def product(rhs, lhs):
        return jnp.einsum(
            subscripts,
            lhs,
            rhs,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )

    states = None if scaling is None else {"": scaling}
    return train_products(product, config, key=key, scaling=states)(rhs, lhs)


def _check_labels(subscripts):
    terms, arrow, output = str(subscripts).replace(" ", "").partition("->")
    lhs, comma, rhs = terms.partition(",")
    labels = [c for c in lhs + rhs if c.isalpha()]
    out = set(output) if arrow else {c for c in labels if labels.count(c) == 1}
    summed = [c for c in rhs if c.isalpha() and c not in out]
    is_product = comma and summed and all(c in lhs for c in summed)
    if not is_product or any(rhs.count(c) > 1 for c in rhs if c.isalpha()):
        raise ValueError(
            "subscripts must name two operands and sum over labels that both have, such as "
            f"'btd,dh->bth'; got {subscripts!r}. Sum over other labels of rhs before, or use "
            "jax.numpy.einsum."
        )
