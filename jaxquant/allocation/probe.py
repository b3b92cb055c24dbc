"""Measures, in one backward pass, what candidate errors of weights do to a loss.

A product y = x W^T is followed by a function that returns y, and whose derivative, for an input of
zeros with one element per candidate dW, is the sum over rows of (g^T dW x)^2, g = d loss / d y.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..calibration.internal import with_tap
from ..core import QTensor
from ..ops import Activations

_PRODUCTS = ("dot_general", "ragged_dot")


def probed(
    weight: jax.Array,
    errors: jax.Array,
    sums: jax.Array,
    axes: tuple[int, ...],
    path: str,
    reached: Callable[[str], None],
    row_axes: int | None,
) -> QTensor:
    """A float array that measures its candidate errors in each product.

    Args:
        weight: the parameter.
        errors: dW of each candidate, (*shape of the parameter, candidates).
        sums: zeros (leading axes that may be stacked..., candidates), which get the derivative.
        axes: contracted axes of the parameter, from 0 up.
        path: of the parameter.
        reached: called with the path when a product is traced.
        row_axes: leading axes of rows whose elements are squared each; those of further axes are
            added first. None for all axes.
    """
    tap = _Probe(
        errors,
        sums,
        axes=tuple(a - weight.ndim for a in axes),
        path=path,
        reached=reached,
        row_axes=row_axes,
    )
    return with_tap(weight, axes, tap)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Probe:
    """The tap of `probed`. Scans slice its arrays along with the parameter.

    Attributes:
        errors, sums, path, reached, row_axes: as for `probed`.
        axes: contracted axes, counted from the end of the parameter's.
    """

    errors: jax.Array
    sums: jax.Array
    axes: tuple[int, ...] = dataclasses.field(kw_only=True, metadata={"static": True})
    path: str = dataclasses.field(kw_only=True, metadata={"static": True})
    reached: Callable[[str], None] = dataclasses.field(kw_only=True, metadata={"static": True})
    row_axes: int | None = dataclasses.field(kw_only=True, metadata={"static": True})

    def __call__(self, activations: Activations) -> Callable[[jax.Array], jax.Array]:
        shape = self.errors.shape[:-1]
        axes = tuple(len(shape) + a for a in self.axes)
        x = activations.unfolded()
        is_whole = activations.operation in _PRODUCTS and activations.stored_shape == shape
        if x is None or not (is_whole and activations.is_along_scales):
            raise ValueError(
                f"{self.path}: only the errors of whole parameters, or of slices that lax.scan "
                f"makes, in products that contract axes {axes} of {shape} can be scored; got "
                f"{activations.operation} of {activations.stored_shape}. Leave it out with a rule, "
                f"Rule({self.path!r}, None)."
            )
        self.reached(self.path)
        batch = 1 if activations.group_sizes is not None else activations.batch
        errors = _matrices(self.errors, batch, axes)
        sizes = activations.group_sizes
        rows = x.shape[activations.batch : -1]
        # Rows of one example are adjacent.
        length = math.prod(rows[self.row_axes :]) if self.row_axes is not None else 1
        return lambda y: _measured(y, x, errors, self.sums, sizes, length)


def _matrices(errors: jax.Array, batch: int, axes: tuple[int, ...]) -> jax.Array:
    """Errors (*shape, C) as (C, B, N, K)."""
    count = errors.ndim - 1
    rows = [a for a in range(batch, count) if a not in axes]
    x = errors.transpose(count, *range(batch), *rows, *axes)
    lengths = (
        math.prod(errors.shape[:batch]),
        math.prod(errors.shape[a] for a in rows),
        math.prod(errors.shape[a] for a in axes),
    )
    return x.reshape(errors.shape[-1], *lengths)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _measured(
    y: jax.Array,
    x: jax.Array,
    errors: jax.Array,
    sums: jax.Array,
    sizes: jax.Array | None,
    length: int,
) -> jax.Array:
    """y, the product of x (batch..., rows..., K): (batch..., rows..., N...).

    Runs of `length` rows are added before they are squared.
    """
    del x, errors, sums, sizes, length
    return y


def _forward(y: Any, x: Any, errors: Any, sums: Any, sizes: Any, length: int) -> tuple[Any, Any]:
    del length
    return y, (x, errors, sums, sizes)


def _backward(length: int, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    x, errors, sums, sizes = saved
    batch, outputs, columns = errors.shape[1:]
    # With groups of rows, all of them meet the whole stack of matrices.
    products = 1 if sizes is not None else batch
    wide = x.astype(jnp.float32).reshape(products, -1, columns)
    slopes = g.astype(jnp.float32).reshape(products, -1, outputs)

    def score(error: jax.Array) -> jax.Array:
        error = error.astype(jnp.float32)
        if sizes is not None:
            moved = jax.lax.ragged_dot(wide[0], error.transpose(0, 2, 1), sizes)[None]
        else:
            moved = jnp.einsum("btk,bnk->btn", wide, error)
        each = jnp.sum(moved * slopes, -1).reshape(products, -1, length)
        return jnp.sum(jnp.square(jnp.sum(each, -1)))

    scores = jax.lax.map(score, errors)
    # In the first of the slices: all of a parameter share an option.
    first = (0,) * (sums.ndim - 1)
    of_sums = jnp.zeros_like(sums).at[first].set(scores)
    zeros = jnp.zeros_like
    no_size = None if sizes is None else np.zeros(sizes.shape, jax.dtypes.float0)
    return g, zeros(x), zeros(errors), of_sums, no_size


_measured.defvjp(_forward, _backward)
