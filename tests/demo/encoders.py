"""A tiny BERT sentence encoder in a folder, and a NumPy version of the model."""

import json
import math

import numpy as np
import safetensors.numpy
import tokenizers

HEADS, LAYERS, WIDTH, HIDDEN, POSITIONS = 2, 2, 32, 48, 24
EPSILON = 1e-3  # Large enough to matter.
# fmt: off
WORDS = [
    "the", "a", "cat", "dog", "bird", "fish", "sat", "ran", "flew", "swam", "on", "under", "over",
    "in", "mat", "house", "tree", "lake", "red", "blue", "old", "young", "big", "small", "happy",
    "sad", "and", "or", "not", "is", "was", "it", "they", "we", "you", "never", "always", "today",
    "tomorrow", ".", ",",
]
# fmt: on
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]


def write_encoder(folder, seed=0):
    """Random weights, with nonzero biases and scales other than one, and a word tokenizer."""
    random = np.random.default_rng(seed)
    arrays = {}

    def add(name, *shape, size=1.0):
        arrays[name] = (size * random.normal(size=shape)).astype(np.float32)

    def add_dense(name, outputs, inputs):
        add(f"{name}.weight", outputs, inputs, size=1.5 * inputs**-0.5)
        add(f"{name}.bias", outputs, size=0.3)

    def add_norm(name):
        add(f"{name}.bias", WIDTH, size=0.3)
        arrays[f"{name}.weight"] = random.uniform(0.5, 1.5, WIDTH).astype(np.float32)

    for name, rows in (("word", len(VOCABULARY)), ("position", POSITIONS), ("token_type", 2)):
        add(f"embeddings.{name}_embeddings.weight", rows, WIDTH)
    add_norm("embeddings.LayerNorm")
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            add_dense(f"{layer}.attention.{name}", WIDTH, WIDTH)
        add_norm(f"{layer}.attention.output.LayerNorm")
        add_dense(f"{layer}.intermediate.dense", HIDDEN, WIDTH)
        add_dense(f"{layer}.output.dense", WIDTH, HIDDEN)
        add_norm(f"{layer}.output.LayerNorm")
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    sizes = {"num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "layer_norm_eps": EPSILON}
    (folder / "config.json").write_text(json.dumps(sizes))
    _write_tokenizer(folder)
    return arrays


def _write_tokenizer(folder):
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=special
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def sentences(count, seed=0):
    """Different sentences of 3 to 12 known words."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(3, 13))) for _ in range(count)]


def embed(arrays, ids, mask):
    """Computes one sentence at a time in float64, without padding."""
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
    return np.stack([_embed_one(arrays, i[m > 0]) for i, m in zip(ids, mask, strict=True)])


def _embed_one(arrays, ids):
    """Devlin et al. 2019, section 3; Vaswani et al. 2017, section 3.2."""
    x = arrays["embeddings.word_embeddings.weight"][ids]
    x = x + arrays["embeddings.token_type_embeddings.weight"][0]
    x = x + arrays["embeddings.position_embeddings.weight"][: len(ids)]
    x = _normalize(arrays, "embeddings.LayerNorm", x)
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        x = _normalize(arrays, f"{layer}.attention.output.LayerNorm", x + _attend(arrays, layer, x))
        hidden = _dense(arrays, f"{layer}.intermediate.dense", x)
        hidden = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        out = _dense(arrays, f"{layer}.output.dense", hidden)
        x = _normalize(arrays, f"{layer}.output.LayerNorm", x + out)
    mean = x.mean(0)
    return mean / np.sqrt(np.sum(mean**2))


def _attend(arrays, layer, x):
    projected = [
        _dense(arrays, f"{layer}.attention.self.{name}", x) for name in ("query", "key", "value")
    ]
    size = WIDTH // HEADS
    mixed = []
    for head in range(HEADS):
        query, key, value = (p[:, head * size : (head + 1) * size] for p in projected)
        weights = np.exp(query @ key.T / math.sqrt(size))
        mixed.append(weights / weights.sum(1, keepdims=True) @ value)
    return _dense(arrays, f"{layer}.attention.output.dense", np.concatenate(mixed, 1))


def _dense(arrays, name, x):
    return x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]


def _normalize(arrays, name, x):
    variance = x.var(1, keepdims=True)
    centered = (x - x.mean(1, keepdims=True)) / np.sqrt(variance + EPSILON)
    return centered * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]
