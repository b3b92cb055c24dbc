"""Tiny Llamas in files of both kinds, and a NumPy version of the model."""

import json

import numpy as np
import tokenizers

from ..checkpoints import folders, gguf_files

# No two sizes are equal. GGUF's blocks have 32 elements.
HEADS, KV_HEADS, HEAD_SIZE, WIDTH, HIDDEN, LAYERS = 8, 2, 12, 32, 64, 3
EPSILON, BASE, CONTEXT = 1e-3, 500.0, 300  # An epsilon that is large enough to matter.
_ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "i n", "Ġ 1"]
CONTROL = ["<|im_start|>", "<|im_end|>"]
TOKENS = [*CONTROL, *_ALPHABET, *(m.replace(" ", "") for m in MERGES)]
STOP = 1
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONFIG = {
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "rms_norm_eps": EPSILON,
    "rope_theta": BASE,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": STOP,
    "dtype": "float32",
}
_KERNELS = {
    "self_attn.q_proj": ("attn_q", HEADS * HEAD_SIZE, WIDTH),
    "self_attn.k_proj": ("attn_k", KV_HEADS * HEAD_SIZE, WIDTH),
    "self_attn.v_proj": ("attn_v", KV_HEADS * HEAD_SIZE, WIDTH),
    "self_attn.o_proj": ("attn_output", WIDTH, HEADS * HEAD_SIZE),
    "mlp.gate_proj": ("ffn_gate", HIDDEN, WIDTH),
    "mlp.up_proj": ("ffn_up", HIDDEN, WIDTH),
    "mlp.down_proj": ("ffn_down", WIDTH, HIDDEN),
}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def random_arrays(seed=0, head=True, biases=()):
    """Arrays under the names of Hugging Face."""
    random = np.random.default_rng(seed)

    def normal(*shape, size=1.0):
        return (size * random.normal(size=shape)).astype(np.float32)

    arrays = {"model.embed_tokens.weight": normal(len(TOKENS), WIDTH)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, (_, rows, columns) in _KERNELS.items():
            arrays[f"{layer}.{name}.weight"] = normal(rows, columns, size=1.5 * columns**-0.5)
            if name in biases:
                arrays[f"{layer}.{name}.bias"] = normal(rows, size=0.3)
        for name in _NORMS:
            arrays[f"{layer}.{name}.weight"] = random.uniform(0.5, 1.5, WIDTH).astype(np.float32)
    arrays["model.norm.weight"] = random.uniform(0.5, 1.5, WIDTH).astype(np.float32)
    if head:
        arrays["lm_head.weight"] = normal(len(TOKENS), WIDTH, size=0.3)
    return arrays


def byte_pairs():
    """The tokenizer that files describe, made by hand."""
    ids = {token: i for i, token in enumerate(TOKENS)}
    merges = [tuple(m.split(" ")) for m in MERGES]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges))
    split = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = split.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(CONTROL)
    return tokenizer


def write_folder(folder, arrays, **changes):
    """A folder as the Hub has them, with a tokenizer and a template."""
    folder.mkdir(exist_ok=True)
    folders.write_folder(folder, CONFIG | changes, arrays)
    byte_pairs().save(str(folder / "tokenizer.json"))
    options = {"chat_template": TEMPLATE, "eos_token": {"content": "<|im_end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return folder


def write_gguf(path, arrays, changes=(), extra=()):
    """A GGUF file. Kernels are Q8_0, except one; returns the arrays that it decodes to."""
    tensors, decoded = [], {}
    for name, array in arrays.items():
        stored = name_in_gguf(name)
        if array.ndim == 1 or name == "model.layers.2.mlp.down_proj.weight":
            tensors.append(gguf_files.array(stored, array))
            decoded[name] = array
            continue
        array = array.reshape(*array.shape[:-1], -1, 32)
        scale = (np.abs(array).max(-1, keepdims=True) / 127).astype(np.float16)
        codes = np.round(array / scale.astype(np.float32)).clip(-128, 127).astype(np.int8)
        decoded[name] = (codes * scale.astype(np.float32)).reshape(arrays[name].shape)
        blocks = np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], -1)
        blocks = blocks.reshape(len(blocks), -1)[rows_in_gguf(name)]
        tensors.append((stored, arrays[name].shape, 8, blocks.tobytes()))
    pairs = {p[0]: p for p in [*PAIRS, *changes]}
    path.write_bytes(gguf_files.gguf([*pairs.values()], [*tensors, *extra]))
    return decoded


def name_in_gguf(name):
    """blk.0.attn_q.weight for model.layers.0.self_attn.q_proj.weight."""
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    base, _, end = name.rpartition(".")
    if base in names:
        return f"{names[base]}.{end}"
    _, _, index, part = base.split(".", 3)
    return f"blk.{index}.{_NORMS.get(part) or _KERNELS[part][0]}.{end}"


def rows_in_gguf(name):
    """For each row of the file, the row of Hugging Face: pairs of RoPE become neighbours."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return slice(None)
    rows = np.arange(heads * HEAD_SIZE).reshape(heads, 2, HEAD_SIZE // 2)
    return rows.swapaxes(1, 2).reshape(-1)


_INT, _FLOAT, _STRING, _ARRAY = gguf_files.UINT32, gguf_files.FLOAT32, gguf_files.STRING, 9
PAIRS = [
    ("general.architecture", _STRING, "llama"),
    ("llama.attention.head_count", _INT, HEADS),
    ("llama.attention.head_count_kv", _INT, KV_HEADS),
    ("llama.attention.key_length", _INT, HEAD_SIZE),
    ("llama.attention.layer_norm_rms_epsilon", _FLOAT, EPSILON),
    ("llama.block_count", _INT, LAYERS),
    ("llama.embedding_length", _INT, WIDTH),
    ("llama.context_length", _INT, CONTEXT),
    ("llama.rope.freq_base", _FLOAT, BASE),
    ("llama.rope.dimension_count", _INT, HEAD_SIZE),
    ("tokenizer.ggml.model", _STRING, "gpt2"),
    ("tokenizer.ggml.pre", _STRING, "smollm"),
    ("tokenizer.ggml.tokens", _ARRAY, (_STRING, TOKENS)),
    ("tokenizer.ggml.token_type", _ARRAY, (5, [3, 3] + [1] * (len(TOKENS) - 2))),
    ("tokenizer.ggml.merges", _ARRAY, (_STRING, MERGES)),
    ("tokenizer.ggml.bos_token_id", _INT, 0),
    ("tokenizer.ggml.eos_token_id", _INT, STOP),
    ("tokenizer.chat_template", _STRING, TEMPLATE),
]


def logits(arrays, ids, frequencies=None):
    """All logits of one sequence (T,) -> (T, V), in float64, from the whole sequence at once."""
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
    if frequencies is None:
        frequencies = BASE ** (-np.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    x = arrays["model.embed_tokens.weight"][np.asarray(ids)]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        normed = _normalize(x, arrays[f"{layer}.input_layernorm.weight"])
        x = x + _attend(arrays, f"{layer}.self_attn", normed, frequencies)
        normed = _normalize(x, arrays[f"{layer}.post_attention_layernorm.weight"])
        gate = _dense(arrays, f"{layer}.mlp.gate_proj", normed)
        hidden = gate / (1 + np.exp(-gate)) * _dense(arrays, f"{layer}.mlp.up_proj", normed)
        x = x + _dense(arrays, f"{layer}.mlp.down_proj", hidden)
    head = arrays.get("lm_head.weight", arrays["model.embed_tokens.weight"])
    return _normalize(x, arrays["model.norm.weight"]) @ head.T


def _attend(arrays, layer, x, frequencies):
    out = np.zeros((len(x), HEADS * HEAD_SIZE))
    projected = {n: _dense(arrays, f"{layer}.{n}_proj", x) for n in ("q", "k", "v")}

    def head_of(name, head):
        return projected[name][:, head * HEAD_SIZE : (head + 1) * HEAD_SIZE]

    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        query = _rotate(head_of("q", head), frequencies)
        key, value = _rotate(head_of("k", shared), frequencies), head_of("v", shared)
        for t in range(len(x)):
            weights = np.exp(key[: t + 1] @ query[t] / np.sqrt(HEAD_SIZE))
            out[t, head * HEAD_SIZE : (head + 1) * HEAD_SIZE] = (
                weights / weights.sum() @ value[: t + 1]
            )
    return _dense(arrays, f"{layer}.o_proj", out)


def _rotate(x, frequencies):
    """Elements i and i + D/2 as a complex number, times exp(i * angle)."""
    turned = (x[:, : HEAD_SIZE // 2] + 1j * x[:, HEAD_SIZE // 2 :]) * np.exp(
        1j * np.outer(np.arange(len(x)), frequencies)
    )
    return np.concatenate([turned.real, turned.imag], 1)


def _dense(arrays, name, x):
    return x @ arrays[f"{name}.weight"].T + arrays.get(f"{name}.bias", 0)


def _normalize(x, scale):
    return x / np.sqrt((x**2).mean(1, keepdims=True) + EPSILON) * scale
