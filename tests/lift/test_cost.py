"""A lifted function compiles to what the same function, written by hand, compiles to."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq
from jaxquant.core import affine
from jaxquant.demo import encoder

from ..demo import encoders

IDS = jnp.asarray([[2, 7, 9, 11, 3], [2, 5, 3, 0, 0]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The demo's encoder, with random parameters: (params, config)."""
    folder = tmp_path_factory.mktemp("encoder")
    encoders.write_encoder(folder)
    return encoder.load_encoder(folder)


def operations(compiled):
    """How often each operation occurs in a compiled program."""
    return collections.Counter(re.findall(r" ([a-z][a-z\-]+)\(", compiled.as_text()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme", [jq.W8A8, jq.ArrayConfig(format=jq.INT4, group_size=16)], ids=str
)
def test_the_compiled_program_is_that_of_the_operations_written_by_hand(model, scheme):
    params, config = model

    def embed(params):
        return encoder.embed(params, config, IDS, (IDS > 0).astype(jnp.int32))

    quantized = jq.tree.quantize(params, jq.uses(embed, params).rules(scheme))
    lifted, by_hand = (jax.jit(fn).lower(quantized).compile() for fn in (jq.lift(embed), embed))

    assert operations(lifted) == operations(by_hand)
    assert jnp.allclose(lifted(quantized), by_hand(quantized), rtol=1e-5, atol=1e-6)
    assert not jq.explain(jq.lift(embed), quantized).dequantized
    assert len(jq.explain(jq.lift(embed), quantized)) == 4


def test_the_decoding_of_each_kind_of_parameter_is_traced_once(monkeypatch):
    traced = []

    def decode(codes, *others):
        traced.append(codes.shape)
        return affine_decode(codes, *others)

    affine_decode = affine.decode
    monkeypatch.setattr(affine, "decode", decode)
    # No other test has a kernel of this shape, whose program JAX would keep.
    kernels = [jq.quantize(jnp.full((192, 23), i + 1.0), jq.NF4A16.weights) for i in range(2)]
    jax.jit(jq.lift(lambda kernels, x: x @ kernels[0] + x @ kernels[1])).lower(
        kernels, jnp.ones((2, 192))
    )
    assert len(traced) == 1, traced
