"""README's examples of models from other libraries."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq

from . import checks

pytestmark = pytest.mark.usefixtures("quick_compilation")
README = pathlib.Path(__file__).parents[2] / "README.md"


def flax_nnx():
    nnx = pytest.importorskip("flax.nnx", reason="pip install -e '.[frameworks]'")
    attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(0))
    model = nnx.Sequential(attention, nnx.Linear(64, 32, rngs=nnx.Rngs(1)))
    x = checks.normal(2, 8, 64)
    return {"model": model, "x": x}, model(x), 5


def equinox():
    eqx = pytest.importorskip("equinox", reason="pip install -e '.[frameworks]'")
    model, x = eqx.nn.MLP(64, 10, 128, 2, key=jax.random.key(0)), checks.normal(16, 64)
    return {"model": model, "x": x, "eqx": eqx}, jax.vmap(model)(x), 3


def keras_hub():
    hub = pytest.importorskip("keras_hub", reason="pip install --no-deps keras-hub")
    model = hub.models.LlamaBackbone(
        vocabulary_size=128,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=64,
        intermediate_dim=128,
    )
    tokens = checks.tokens()
    x = {"token_ids": tokens, "padding_mask": jnp.ones_like(tokens)}
    return {"model": model, "x": x}, model(x), 15


@pytest.mark.parametrize("place, model", list(enumerate([flax_nnx, equinox, keras_hub])))
def test_an_example_runs(place, model):
    names, expected, matrices = model()
    blocks = re.findall(r"```py\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names |= {"jax": jax, "jq": jq}
    exec(compile(blocks[place], str(README), "exec"), names)
    assert len(checks.quantized_paths(names["quantized"])) == matrices
    assert 0 < checks.distance(names["y"], expected) < 0.04
