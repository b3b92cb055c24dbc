"""A scalar index selects one row of a table: a lookup, as in a loop that generates tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq

from . import cases

ROWS = {
    "index": lambda w: 8.0 * w[cases.INDEX[0]] + 1.0,
    "dynamic_slice": lambda w: jnp.tanh(lax.dynamic_slice_in_dim(w, cases.INDEX[1], 1)),
    "column": lambda w: jnp.tanh(w[:, cases.INDEX[2]]),
}


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("quantized", ["int8", "nf4 g32 nested"])
def test_a_row_is_looked_up(name, quantized):
    x = cases.parameter(quantized).dequantize()
    config, _ = cases.QUANTIZED[quantized]
    q = jq.quantize(x, config, axis=0 if name == "column" else 1)
    fn = ROWS[name]
    found = jax.jit(jq.lift(fn, strict=True))(q)
    np.testing.assert_allclose(found, jax.jit(fn)(q.dequantize()), rtol=1e-6, atol=1e-6)
    assert not jq.explain(jq.lift(fn), q).dequantized


def test_a_matrix_of_a_stack_is_not_a_row():
    stack = jq.quantize(
        cases.parameter("int8").dequantize().reshape(2, 32, 96), jq.ArrayConfig(), 1
    )
    found = jq.explain(jq.lift(lambda w, i: jnp.tanh(w[i])), stack, jnp.int32(1))
    assert [row.primitive for row in found.dequantized] == ["tanh"]
