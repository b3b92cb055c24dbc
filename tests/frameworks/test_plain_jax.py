"""Functions as people write them in JAX alone: fused kernels, experts, generation with a cache."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxquant as jq

from . import checks

pytestmark = pytest.mark.usefixtures("quick_compilation")
HEADS, SIZE, WIDTH, WORDS, LAYERS = 4, 16, 64, 128, 3


def rms(x):
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def attend(q, k, v, mask):
    scores = jnp.where(mask, jnp.einsum("...thd,...shd->...hts", q, k) / SIZE**0.5, -1e9)
    return jnp.einsum("...hts,...shd->...thd", jax.nn.softmax(scores, axis=-1), v)


def weight(index, *shape):
    return checks.normal(*shape, seed=index) / 8


GPT = {
    "wte": weight(0, WORDS, WIDTH),
    "wpe": weight(1, 32, WIDTH),
    "layers": {
        "qkv": weight(2, LAYERS, WIDTH, 3 * WIDTH),
        "out": weight(3, LAYERS, WIDTH, WIDTH),
        "up": weight(4, LAYERS, WIDTH, 2 * WIDTH),
        "down": weight(5, LAYERS, WIDTH, 2 * WIDTH),
        "norm": 1 + weight(6, LAYERS, WIDTH),
        "bias": weight(7, LAYERS, 2 * WIDTH),
    },
}


def gpt(params, tokens):
    """A fused kernel of Q, K and V, a kernel stored transposed, layers under scan and remat."""
    mask = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))

    @jax.checkpoint
    def layer(x, p):
        heads = (*x.shape[:2], HEADS, SIZE)
        q, k, v = (a.reshape(heads) for a in jnp.split(rms(x) * p["norm"] @ p["qkv"], 3, axis=-1))
        x = x + attend(q, k, v, mask).reshape(x.shape) @ p["out"]
        return x + jax.nn.gelu(rms(x) @ p["up"] + p["bias"]) @ p["down"].T, None

    x = params["wte"][tokens] + params["wpe"][jnp.arange(tokens.shape[1])]
    x, _ = lax.scan(layer, x, params["layers"])
    return rms(x) @ params["wte"].T


@pytest.mark.slow
def test_a_fused_kernel_and_stacked_layers():
    checks.check_schemes(gpt, GPT, checks.tokens(), matrices=6, looked_up=["wpe"])


GEMMA = {
    "embed": weight(0, WORDS, WIDTH),
    "q": weight(1, HEADS, WIDTH, SIZE),
    "kv": weight(2, 2, HEADS, WIDTH, SIZE),
    "out": weight(3, HEADS, SIZE, WIDTH),
    "gate": weight(4, 2, WIDTH, 2 * WIDTH),
    "down": weight(5, 2 * WIDTH, WIDTH),
}


def gemma(params, tokens):
    """Kernels of two products in one array, which is indexed, and a scaled embedding."""
    x = params["embed"][tokens] * WIDTH**0.5
    k, v = (jnp.einsum("btd,hdk->bthk", rms(x), params["kv"][i]) for i in (0, 1))
    q = jnp.einsum("btd,hdk->bthk", rms(x), params["q"])
    mask = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    x = x + jnp.einsum("bthk,hkd->btd", attend(q, k, v, mask), params["out"])
    hidden = jax.nn.gelu(rms(x) @ params["gate"][0]) * (rms(x) @ params["gate"][1])
    return (rms(x) + hidden @ params["down"]) @ params["embed"].T


@pytest.mark.slow
def test_kernels_in_one_array_and_a_tied_embedding():
    checks.check_schemes(gemma, GEMMA, checks.tokens(), matrices=6)


EXPERTS = {
    "router": weight(0, WIDTH, 4),
    "up": weight(1, 4, WIDTH, 2 * WIDTH),
    "down": weight(2, 4, 2 * WIDTH, WIDTH),
}


def experts(params, x):
    """Each row goes to one expert, by ragged products of sorted rows."""
    chosen = jnp.argmax(x @ params["router"], axis=-1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=4)
    hidden = jax.nn.relu(lax.ragged_dot(x[order], params["up"], sizes))
    return jnp.zeros_like(x).at[order].set(lax.ragged_dot(hidden, params["down"], sizes))


@pytest.mark.slow
def test_experts():
    # The router stays in float: an error there would send rows to other experts.
    x, expert = checks.normal(16, WIDTH), {n: EXPERTS[n] for n in ("up", "down")}
    checks.check_schemes(lambda params, x: experts({**EXPERTS, **params}, x), expert, x, matrices=2)


def generate(params, prompts, length):
    """Greedy generation in a while loop, with a cache of keys and values."""
    rows, given = prompts.shape

    def step(state):
        place, tokens, cache = state
        x = params["embed"][tokens[:, place]] * WIDTH**0.5
        k, v = (jnp.einsum("bd,hdk->bhk", rms(x), params["kv"][i]) for i in (0, 1))
        cache = cache.at[:, :, place].set(jnp.stack([k, v]))
        q = jnp.einsum("bd,hdk->bhk", rms(x), params["q"])
        mixed = attend(q[:, None], cache[0], cache[1], jnp.arange(length) <= place)[:, 0]
        x = jnp.einsum("bhk,hkd->bd", mixed, params["out"])
        x = x + jnp.tanh(rms(x) @ params["gate"][0]) @ params["down"]
        found = jnp.where(place + 1 < given, tokens[:, place + 1], jnp.argmax(logits(x), axis=-1))
        return place + 1, tokens.at[:, place + 1].set(found), cache

    def logits(x):
        return rms(x) @ params["embed"].T

    tokens = jnp.zeros((rows, length), jnp.int32).at[:, :given].set(prompts)
    cache = jnp.zeros((2, rows, length, HEADS, SIZE))
    return lax.while_loop(lambda state: state[0] < length - 1, step, (0, tokens, cache))[1]


@pytest.mark.some_rows(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme",
    [jq.W8A16, checks.SCHEMES["W4A16"][0], checks.NF4],
    ids=["W8A16", "W4A16", "NF4"],
)
def test_greedy_generation_yields_the_tokens_of_the_dequantized_model(scheme):
    params, prompts = GEMMA, checks.tokens(WORDS, (2, 4))
    uses = jq.uses(generate, params, prompts, 24)
    assert set(uses.contracted) == {"embed", "q", "kv", "out", "gate", "down"}
    quantized = jq.tree.quantize(params, uses.rules(scheme))
    lifted = jq.lift(generate, strict=True)
    found = jax.jit(lifted, static_argnums=2)(quantized, prompts, 24)
    expected = jax.jit(generate, static_argnums=2)(jq.tree.dequantize(quantized), prompts, 24)
    assert found.tolist() == expected.tolist()
    assert len(set(found.ravel().tolist())) > 12
