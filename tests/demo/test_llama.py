"""The language model against a NumPy version that attends to the whole sequence at once."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import demo, kv

from . import llamas


@pytest.fixture(scope="module")
def float_model(tmp_path_factory):
    arrays = llamas.random_arrays()
    folder = llamas.write_folder(tmp_path_factory.mktemp("llama"), arrays)
    return demo.load_llama(folder), arrays


@pytest.fixture(scope="module")
def stored_model(tmp_path_factory):
    """A quantized file without a head, and the arrays that it stands for."""
    path = tmp_path_factory.mktemp("llama") / "model.gguf"
    decoded = llamas.write_gguf(path, llamas.random_arrays(1, head=False))
    return demo.load_llama(path), decoded


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).integers(2, len(llamas.TOKENS), shape)


step = jax.jit(demo.forward)


def run(model, tokens, cache=None, counts=None, params=None, store=jnp.float32):
    """Logits, and the cache."""
    params = model.params if params is None else params
    if cache is None:
        cache = demo.init_cache(params, model.config, len(tokens), 20, store)
    x, cache = step(params, model.config, np.asarray(tokens), cache, counts)
    return demo.logits(params, x), cache


def assert_close(found, want, tolerance=1e-5):
    error = np.abs(np.asarray(found, np.float64) - want).max()
    assert error <= tolerance * np.abs(want).max(), error


def test_logits_equal_the_numpy_version(float_model):
    model, arrays = float_model
    tokens = drawn(2, 9)
    found, _ = run(model, tokens)
    for row, ids in zip(found, tokens, strict=True):
        assert_close(row, llamas.logits(arrays, ids))


def test_a_quantized_file_equals_the_arrays_that_it_decodes_to(stored_model):
    model, decoded = stored_model
    assert [len(stack["attention_norm"]) for stack in model.params["layers"]] == [2, 1]
    kernels = [stack["down"]["kernel"] for stack in model.params["layers"]]
    assert [isinstance(k, jq.QTensor) for k in kernels] == [True, False]
    (ids,) = tokens = drawn(1, 9)
    found, _ = run(model, tokens)
    assert_close(found[0], llamas.logits(decoded, ids))


@pytest.mark.slow
def test_prefill_and_decoding_equal_one_pass(stored_model):
    model, decoded = stored_model
    tokens, lengths = drawn(3, 9), (5, 2, 4)
    _, cache = run(model, tokens[:, :5], counts=jnp.array(lengths))
    np.testing.assert_array_equal(cache.lengths, [lengths] * llamas.LAYERS)
    for i in range(3):
        last = [[tokens[b, n + i]] for b, n in enumerate(lengths)]
        found, cache = run(model, last, cache)
        for b, length in enumerate(lengths):
            want = llamas.logits(decoded, tokens[b, : length + i + 1])[-1]
            assert_close(found[b, 0], want)


@pytest.mark.slow
def test_quantized_parameters_equal_their_dequantized_values(float_model):
    model, _ = float_model
    quantized = demo.requantize(model.params, jq.W4A16)
    kinds = {type(x) for x in jax.tree.leaves(quantized["layers"], is_leaf=is_quantized)}
    assert jq.QTensor in kinds
    floats = demo.requantize(quantized, None)
    tokens = drawn(1, 7)
    assert_close(run(model, tokens, params=quantized)[0], run(model, tokens, params=floats)[0])


def is_quantized(x):
    return isinstance(x, jq.QTensor)


@pytest.mark.slow
def test_eight_bit_activations_stay_close(float_model):
    model, arrays = float_model
    (ids,) = tokens = drawn(1, 7)
    found, _ = run(model, tokens, params=demo.requantize(model.params, jq.W8A8))
    assert_close(found[0], llamas.logits(arrays, ids), 0.1)


@pytest.mark.some_rows(1)
@pytest.mark.parametrize(("name", "bound"), [("bfloat16", 0.03), ("int8", 0.03), ("int4", 0.4)])
def test_quantized_caches_stay_close(float_model, name, bound):
    model, arrays = float_model
    (ids,) = tokens = drawn(1, 7)
    found, _ = run(model, tokens, store=demo.STORES[name])
    want = llamas.logits(arrays, ids)
    assert_close(found[0], want, bound)
    assert np.abs(found[0] - want).max() > 1e-4


# By the names of kernels.
PARTS = {
    **dict.fromkeys(("query", "key", "value", "gate", "up"), jax.P(None, "model")),
    **dict.fromkeys(("out", "down"), jax.P(None, None, "model")),
    "embedding": jax.P("model"),
}


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("scheme", [None, "W8A8", "W4A16"])
def test_devices_share_heads_and_kernels_in_a_mesh_with_explicit_axes(float_model, scheme):
    model, _ = float_model
    mesh, params = jax.make_mesh((2,), ("model",)), model.params
    if scheme is not None:
        rules = [jq.Rule("layers/*/kernel", jq.SCHEMES[scheme], axis=-1, group_size=8)]
        rules = rules if scheme == "W4A16" else [jq.Rule("layers/*/kernel", jq.W8A8, axis=-1)]
        params = jq.tree.quantize(params, rules)

    def place(path, x):
        names = [getattr(key, "key", None) for key in path]
        spec = next((s for name, s in PARTS.items() if name in names), jax.P())
        specs = jq.specs(x, spec, mesh) if jq.tree.is_quantized(x) else spec
        return jax.device_put(x, jax.tree.map(lambda s: jax.NamedSharding(mesh, s), specs))

    parts = jax.tree_util.tree_map_with_path(place, params, is_leaf=jq.tree.is_quantized)
    tokens = drawn(2, 9)
    wanted, cache = run(model, tokens[:, :5], params=params)
    wanted, _ = run(model, tokens[:, 5:], cache, params=params)
    with jax.set_mesh(mesh):
        cache = demo.init_cache(parts, model.config, 2, 20, jnp.float32)
        heads = jax.NamedSharding(mesh, jax.P(None, None, "model"))
        cache = jax.tree.map(lambda x: jax.device_put(x, heads) if x.ndim > 2 else x, cache)
        found, cache = run(model, tokens[:, :5], cache, params=parts)
        found, cache = run(model, tokens[:, 5:], cache, params=parts)
        assert jax.typeof(cache.keys).sharding.spec[2] == "model"
        assert_close(found, np.asarray(wanted, np.float64), 1e-4)


def test_stacked_layers_equal_a_loop(float_model):
    model, _ = float_model
    (stack,) = model.params["layers"]
    layers = [jax.tree.map(lambda x, i=i: x[i : i + 1], stack) for i in range(llamas.LAYERS)]
    tokens = drawn(2, 9)
    found, _ = run(model, tokens, params={**model.params, "layers": tuple(layers)})
    assert_close(found, run(model, tokens)[0], 1e-6)


def test_layers_with_experts_may_be_in_several_stacks():
    width, hidden, experts, layers = 16, 24, 4, 3
    random = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(random.normal(size=(layers, *shape)) / 4, jnp.float32)

    names = ("query", "key", "value", "out")
    kernels = {**dict.fromkeys(names, (width, width)), "router": (experts, width)}
    stack = {name: {"kernel": array(*shape)} for name, shape in kernels.items()}
    stack |= {name: jnp.ones((layers, width)) for name in ("attention_norm", "mlp_norm")}
    stack["experts"] = {
        "gate": array(experts, width, hidden),
        "up": array(experts, width, hidden),
        "down": array(experts, hidden, width),
    }
    config = demo.LlamaConfig(2, 2, layers, 1e-5, experts_per_token=2)
    params = {"embedding": array(9, width)[0], "norm": jnp.ones(width)}
    params |= {"frequencies": jnp.ones(width // 4)}
    found = []
    for first in (0, 1):
        parts = [jax.tree.map(lambda x, s=s: x[s], stack) for s in (slice(first), slice(first, 3))]
        given = params | {"layers": parts[1 - first :]}
        cache = demo.init_cache(params, config, 1, 5, jnp.float32)
        found += [demo.forward(given, config, jnp.arange(4)[None], cache)[0]]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_biases_are_added(tmp_path):
    arrays = llamas.random_arrays(biases=("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"))
    model = demo.load_llama(llamas.write_folder(tmp_path, arrays))
    (ids,) = tokens = drawn(1, 7)
    assert_close(run(model, tokens)[0][0], llamas.logits(arrays, ids))


def test_parameters_in_bfloat16(float_model, tmp_path):
    _, arrays = float_model
    model = demo.load_llama(llamas.write_folder(tmp_path, arrays), jnp.bfloat16)
    assert {x.dtype.name for x in jax.tree.leaves(model.params)} == {"bfloat16", "float32"}
    (ids,) = tokens = drawn(1, 7)
    assert_close(run(model, tokens)[0][0], llamas.logits(arrays, ids), 0.05)


PLAIN = llamas.BASE ** (-np.arange(0, llamas.HEAD_SIZE, 2) / llamas.HEAD_SIZE)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def by_wavelength(frequency):
    """Llama 3.1's rule, case by case."""
    wavelength = 2 * math.pi / frequency
    if wavelength < 256 / 4:
        return frequency
    if wavelength > 256 / 1:
        return frequency / 8
    smooth = (256 / wavelength - 1) / (4 - 1)
    return (1 - smooth) * frequency / 8 + smooth * frequency


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, PLAIN / 4),
        ({"rope_scaling": LLAMA3}, np.array([by_wavelength(f) for f in PLAIN])),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 500.0}}, PLAIN),
        ({"rope_theta": None}, 10000.0 ** (-np.arange(0, 12, 2) / 12)),
    ],
    ids=["linear", "llama3", "section", "default"],
)
def test_frequencies_follow_the_configuration(tmp_path, changes, want):
    folder = llamas.write_folder(tmp_path, llamas.random_arrays(), **changes)
    np.testing.assert_allclose(demo.load_llama(folder).params["frequencies"], want, rtol=1e-5)


def test_frequencies_are_divided_by_the_factors_of_a_file(tmp_path):
    factors = np.array([1, 1, 2, 3, 4, 8], np.float32)
    extra = [llamas.gguf_files.array("rope_freqs.weight", factors)]
    llamas.write_gguf(tmp_path / "a.gguf", llamas.random_arrays(), extra=extra)
    found = demo.load_llama(tmp_path / "a.gguf").params["frequencies"]
    np.testing.assert_allclose(found, PLAIN / factors, rtol=1e-5)


def test_a_window_limits_the_context(tmp_path):
    folder = llamas.write_folder(tmp_path, llamas.random_arrays(), sliding_window=100)
    assert demo.load_llama(folder).context_length == 100


@pytest.mark.parametrize(
    ("changes", "arrays", "text"),
    [
        ({"model_type": "gpt2"}, {}, "must be one of llama, mistral; got 'gpt2'. Run other"),
        ({"num_attention_heads": None}, {}, "num_attention_heads must be a positive int; got None"),
        ({"hidden_size": "32"}, {}, "hidden_size must be a positive int; got '32'"),
        ({"num_key_value_heads": 3}, {}, "multiple of num_key_value_heads, .* got 8, 3 and size"),
        ({"rms_norm_eps": 0}, {}, "rms_norm_eps must be a positive float; got 0"),
        ({"max_position_embeddings": True}, {}, "must be a positive int; got True"),
        ({"rope_scaling": {"type": "yarn"}}, {}, "one of default, none, linear, .* got 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, {}, "factor of linear .* positive number; got None"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, {}, "factor of linear .* got 0"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": "1"}},
            {},
            "low_freq_factor of llama3 .* got '1'",
        ),
        ({"rope_scaling": "linear"}, {}, "rope_scaling must be an object; got 'linear'"),
        ({"rope_scaling": {"type": ["x"]}}, {}, r"one of default, none, .* got \['x'\]"),
        ({"rope_parameters": [1]}, {}, r"rope_scaling must be an object; got \[1\]"),
        ({"hidden_act": "relu"}, {}, "hidden_act must be 'silu'; got 'relu'. Run other"),
        ({"partial_rotary_factor": 0.5}, {}, "partial_rotary_factor must be 1; got 0.5"),
        (
            {"hidden_size": 48},
            {},
            r"input_layernorm.weight must have the shape \(48,\) \(width\).*; got \(32,\)",
        ),
        ({"head_dim": 6}, {}, r"q_proj.weight must have the shape \(48, 32\) .*got \(96, 32\)"),
        (
            {},
            {"model.layers.1.mlp.up_proj.weight": np.ones((60, 32), np.float32)},
            r"layers.1.mlp.up_proj.weight must have .*\(64, 32\) .*; got \(60, 32\)",
        ),
        ({"num_hidden_layers": 4}, {}, "lacks 'model.layers.3.input_layernorm.weight'"),
        ({}, {"model.extra": np.ones(3, np.float32)}, "does not have: model.extra. Run it with"),
    ],
)
def test_other_models_are_errors(tmp_path, changes, arrays, text):
    folder = llamas.write_folder(tmp_path, llamas.random_arrays() | arrays, **changes)
    with pytest.raises(ValueError, match=text):
        demo.load_llama(folder)


def test_embeddings_are_tied_unless_the_configuration_says_otherwise(tmp_path):
    arrays = llamas.random_arrays(head=False)
    for changes in ({}, {"tie_word_embeddings": True}, {"tie_word_embeddings": None}):
        folder = llamas.write_folder(tmp_path, arrays, **changes)
        assert "head" not in demo.load_llama(folder).params
    folder = llamas.write_folder(tmp_path, arrays, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"not a complete Llama model: it lacks 'lm_head.weight'"):
        demo.load_llama(folder)


def test_models_are_named_by_text_too(tmp_path):
    folder = llamas.write_folder(tmp_path, llamas.random_arrays())
    assert demo.load_llama(str(folder)).context_length == llamas.CONTEXT


@pytest.mark.parametrize("count", [1, 5])
def test_other_numbers_of_rotation_factors_are_an_error(tmp_path, count):
    extra = [llamas.gguf_files.array("rope_freqs.weight", np.ones(count))]
    llamas.write_gguf(tmp_path / "a.gguf", llamas.random_arrays(), extra=extra)
    with pytest.raises(ValueError, match=rf"rope_freqs.weight must be 6 numbers.*\({count},\)"):
        demo.load_llama(tmp_path / "a.gguf")


def test_partial_rotations_are_an_error(tmp_path):
    change = ("llama.rope.dimension_count", llamas.gguf_files.UINT32, 8)
    llamas.write_gguf(tmp_path / "a.gguf", llamas.random_arrays(), [change])
    with pytest.raises(ValueError, match="dimension_count must be 12, the size of a head; got 8"):
        demo.load_llama(tmp_path / "a.gguf")


def test_progress_names_each_stack(tmp_path):
    llamas.write_gguf(tmp_path / "a.gguf", llamas.random_arrays())
    calls = []
    demo.load_llama(tmp_path / "a.gguf", progress=lambda *call: calls.append(call))
    assert calls[0] == (1, len(calls), "embedding")
    assert (len(calls), len(calls), "norm") == calls[-1]
    assert "layers/1/down/kernel" in [name for *_, name in calls]


@pytest.mark.slow
def test_tokens_beyond_the_cache_give_nan(float_model):
    model, _ = float_model
    cache = demo.init_cache(model.params, model.config, 1, 4)
    _, cache = run(model, drawn(1, 4), cache)
    found, cache = run(model, drawn(1, 1), cache)
    assert np.isnan(found).all()
    assert isinstance(cache, kv.Cache)


def generated(model, prompt, count, **options):
    return list(demo.generate(model, prompt, count, **options))


@pytest.mark.slow
def test_greedy_tokens_are_the_most_probable(stored_model):
    model, decoded = stored_model
    prompt = drawn(18).tolist()
    found = generated(model, prompt, 4, store=jnp.float32)
    for i, token in enumerate(found):
        assert token == llamas.logits(decoded, prompt + found[:i])[-1].argmax()


@pytest.mark.slow
def test_samples_follow_seed_and_temperature(float_model):
    model, _ = float_model
    prompt = drawn(3).tolist()
    cold = generated(model, prompt, 3, temperature=1e-4)
    assert cold == generated(model, prompt, 3)
    warm = [generated(model, prompt, 8, temperature=5.0, seed=s) for s in (0, 0, 1)]
    assert warm[0] == warm[1] != warm[2]


@pytest.mark.parametrize(("length", "count"), [(0, 1), (290, 11)])
def test_what_does_not_fit_into_the_context_is_an_error(float_model, length, count):
    model, _ = float_model
    text = f"at least 1 each, and 300 together, .* got {length} and {count}"
    with pytest.raises(ValueError, match=text):
        generated(model, [5] * length, count)


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        ([5], {"temperature": -1.0}, "temperature must be 0 or a positive number; got -1.0"),
        ([5], {"temperature": math.nan}, "temperature must be .*; got nan"),
        ([5], {"count": 0}, "number of tokens to generate must be at least 1; got 0"),
        ([5], {"seed": 2**70}, f"seed must be 0 to 4294967295; got {2**70}"),
        ([5, 999, -1], {}, rf"0 to {len(llamas.TOKENS) - 1}; got \[999, -1\]. Use the tokenizer"),
    ],
)
def test_arguments_out_of_range_are_errors(float_model, prompt, options, text):
    with pytest.raises(ValueError, match=text):
        generated(float_model[0], prompt, **{"count": 2, **options})


def test_temperature_and_key_belong_together(float_model):
    model, _ = float_model
    cache = demo.init_cache(model.params, model.config, 1, 4)
    args = model.params, model.config, jnp.ones((1, 1), jnp.int32), cache
    with pytest.raises(ValueError, match=r"both be None or neither; got .* and None. Pass key"):
        demo.next_token(*args, temperature=jnp.float32(1))


def test_biases_do_not_make_groups_smaller(tmp_path):
    arrays = llamas.random_arrays(biases=["self_attn.k_proj"])
    model = demo.load_llama(llamas.write_folder(tmp_path, arrays))
    (stack,) = demo.requantize(model.params, jq.W4A16)["layers"]
    # The bias has 24 elements, which are no contracted axis.
    assert stack["key"]["kernel"].scale.size == llamas.LAYERS * 24


def test_groups_that_do_not_divide_are_made_smaller(float_model):
    model, _ = float_model
    (stack,) = demo.requantize(model.params, jq.W4A8)["layers"]
    down = stack["down"]["kernel"]
    groups = down.scale.shape[down.stored_axes((-1,))[0]]
    assert (down.shape[-1], groups) == (64, 2)  # Groups of 32 = gcd(128, 32, 64, 96).
    assert down.inputs.config == jq.W4A8.inputs
