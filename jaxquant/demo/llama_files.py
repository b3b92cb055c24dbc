"""Reads models of the Llama family from GGUF files and folders of Hugging Face."""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .. import checkpoints
from ..checkpoints import Checkpoint, Source
from ..core import QTensor
from .llama import LlamaConfig, Params

_ARCHITECTURES = ("llama", "mistral")
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
# Names in files, and the axes (N, K).
_KERNELS = {
    "query": ("self_attn.q_proj", "queries", "width"),
    "key": ("self_attn.k_proj", "keys", "width"),
    "value": ("self_attn.v_proj", "keys", "width"),
    "out": ("self_attn.o_proj", "width", "queries"),
    "gate": ("mlp.gate_proj", "hidden", "width"),
    "up": ("mlp.up_proj", "hidden", "width"),
    "down": ("mlp.down_proj", "width", "hidden"),
}
# Settings of Hugging Face that change the model, and the values that are supported.
_FIXED = {"hidden_act": "silu", "partial_rotary_factor": 1}
# Tensors that repeat what the configuration says.
_DERIVED = "rotary_emb.inv_freq"
_GGUF_FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class LlamaModel:
    """A language model as a file has it.

    Attributes:
        params: arrays and QTensors.
        config: hyperparameters.
        context_length: the number of tokens that it was trained for.
        checkpoint: the file, for the tokenizer.
    """

    params: Params
    config: LlamaConfig
    context_length: int
    checkpoint: Checkpoint


def load_llama(
    path: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike = jnp.float32,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> LlamaModel:
    """Reads a model; quantized tensors stay as they are stored.

    Args:
        path: GGUF file, or folder of safetensors files with config.json.
        dtype: of the activations, and of parameters that are not quantized.
        progress: function of (stacks read, stacks in all, name), called after each.

    Raises:
        OSError: a file is missing.
        ValueError: a file is malformed, or holds another kind of model.
    """
    checkpoint = open_model(path)
    settings = _settings(checkpoint)
    tree, names = _tree_of_sources(checkpoint, settings)
    _check_all_used(checkpoint, names)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_stored)
    read = []
    for i, (place, leaf) in enumerate(leaves):
        read.append(checkpoints.put(leaf, dtype=dtype))
        progress(i + 1, len(leaves), jax.tree_util.keystr(place, simple=True, separator="/"))
    structure = jax.tree.structure(tree, is_leaf=_is_stored)
    params = {
        **jax.tree.unflatten(structure, read),
        "frequencies": _frequencies(checkpoint, settings),
    }
    config = LlamaConfig(
        settings.heads, settings.kv_heads, settings.layers, float(settings.epsilon)
    )
    return LlamaModel(params, config, settings.context_length, checkpoint)


def open_model(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint under the names of Hugging Face."""
    if Path(path).is_dir():
        return checkpoints.open_folder(path)
    return checkpoints.open_gguf(path, names="huggingface")


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What the metadata of a file says about the model."""

    heads: int
    kv_heads: int
    layers: int
    width: int
    head_size: int
    epsilon: float
    context_length: int
    rotated: int
    rope_base: float
    rope_scaling: Mapping[str, Any]


def _settings(checkpoint: Checkpoint) -> _Settings:
    is_gguf = checkpoint.container == "gguf"
    architecture, values = _values_of(checkpoint, is_gguf)
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"{checkpoint.path}: the architecture must be one of {', '.join(_ARCHITECTURES)}; got "
            f"{architecture!r}. Run other models with jq.lift."
        )
    keys = _GGUF_KEYS if is_gguf else _FOLDER_KEYS
    found = {name: values[key] for name, key in keys.items() if values.get(key) is not None}
    heads, width = found.get("heads") or 1, found.get("width")
    defaults = {
        "kv_heads": heads,
        "head_size": width // heads if isinstance(width, int) and isinstance(heads, int) else None,
        "rope_base": 10000.0,
        "epsilon": 1e-6,
        "context_length": 2048,
        "rope_scaling": {},
    }
    found = {"heads": None, "layers": None, "width": None, **defaults, **found}
    found["rotated"] = found.get("rotated", found["head_size"])
    _check(checkpoint, found, keys)
    # Within a window, attention to all tokens is the same.
    window = found.pop("window", None) or found["context_length"]
    found["context_length"] = min(found["context_length"], window)
    return _Settings(**found)


def _check(checkpoint: Checkpoint, found: Mapping[str, Any], keys: Mapping[str, str]) -> None:
    """Raises unless the settings are numbers that go together."""
    kinds: dict[str, type] = dict.fromkeys(
        ("heads", "kv_heads", "layers", "width", "head_size"), int
    )
    kinds |= {"context_length": int, "epsilon": float, "rope_base": float, "window": int}
    for name, kind in kinds.items():
        value = found.get(name, kind(1))
        if not isinstance(value, kind | int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise ValueError(
                f"{checkpoint.path}: {keys[name]} must be a positive {kind.__name__}; got "
                f"{value!r}."
            )
    names = "heads", "kv_heads", "head_size", "rotated"
    heads, kv_heads, size, rotated = (found[name] for name in names)
    if heads % kv_heads or size % 2:
        raise ValueError(
            f"{checkpoint.path}: {keys['heads']} must be a multiple of {keys['kv_heads']}, and "
            f"heads of an even size; got {heads}, {kv_heads} and size {size}."
        )
    if rotated != size:
        raise ValueError(
            f"{checkpoint.path}: {keys['rotated']} must be {size}, the size of a head; got "
            f"{rotated}. Partial rotations are not supported."
        )
    if not isinstance(found["rope_scaling"], Mapping):
        raise ValueError(
            f"{checkpoint.path}: {keys['rope_scaling']} must be an object; got "
            f"{found['rope_scaling']!r}."
        )


_GGUF_KEYS = {
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "layers": "block_count",
    "width": "embedding_length",
    "head_size": "attention.key_length",
    "epsilon": "attention.layer_norm_rms_epsilon",
    "context_length": "context_length",
    "window": "attention.sliding_window",
    "rotated": "rope.dimension_count",
    "rope_base": "rope.freq_base",
    "rope_scaling": "rope_scaling",
}
_FOLDER_KEYS = {
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "head_size": "head_dim",
    "epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "window": "sliding_window",
    "rope_base": "rope_theta",
    "rope_scaling": "rope_scaling",
}


def _values_of(checkpoint: Checkpoint, is_gguf: bool) -> tuple[str | None, Mapping[str, Any]]:
    """The architecture, and its settings by key."""
    if not is_gguf:
        config = checkpoint.metadata.get("config", {})
        # From transformers 5 on, what concerns RoPE is in a section.
        rope = config.get("rope_parameters") or {}
        given = {k: v for k, v in config.items() if v is not None}
        values = {"rope_scaling": rope, **(rope if isinstance(rope, Mapping) else {}), **given}
        for key, wanted in _FIXED.items():
            if values.get(key, wanted) != wanted:
                raise ValueError(
                    f"{checkpoint.path}: {key} must be {wanted!r}; got {values[key]!r}. Run other "
                    "models with jq.lift."
                )
        return config.get("model_type"), values
    metadata = checkpoint.metadata
    architecture = metadata["general.architecture"]
    values = {k.removeprefix(f"{architecture}."): v for k, v in metadata.items()}
    scaling = {
        "rope_type": values.get("rope.scaling.type"),
        "factor": values.get("rope.scaling.factor"),
    }
    return architecture, {**values, "rope_scaling": scaling}


def _frequencies(checkpoint: Checkpoint, settings: _Settings) -> jax.Array:
    """Angle per position of each pair, float32 (D / 2,)."""
    pairs = jnp.arange(settings.head_size // 2, dtype=jnp.float32)
    plain = settings.rope_base ** (-2 * pairs / settings.head_size)
    if _GGUF_FACTORS in checkpoint:
        factors = checkpoint[_GGUF_FACTORS]
        if factors.shape != plain.shape or not isinstance(factors.value, Source):
            raise ValueError(
                f"{checkpoint.path}: {_GGUF_FACTORS} must be {plain.size} numbers, one per pair; "
                f"got {factors.kind} of shape {factors.shape}."
            )
        return plain / checkpoints.put(factors.value)
    scaling = settings.rope_scaling
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in list(_SCALINGS):
        raise ValueError(
            f"{checkpoint.path}: RoPE scaling must be one of {', '.join(_SCALINGS)}; got {kind!r}. "
            "Such models are not supported."
        )
    rule, keys = _SCALINGS[kind]
    for key in keys:
        value = scaling.get(key)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(
                f"{checkpoint.path}: {key} of {kind} RoPE scaling must be a positive number; got "
                f"{value!r}."
            )
    return rule(plain, *(scaling[key] for key in keys))


def _by_wavelength(
    plain: jax.Array, factor: float, low: float, high: float, context: float
) -> jax.Array:
    """Llama 3.1: slow rotations are divided by the factor, fast ones are not."""
    share = jnp.clip((context * plain / (2 * math.pi) - low) / (high - low), 0, 1)
    return plain * (share + (1 - share) / factor)


_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# A function of the frequencies, and the keys of its other arguments.
_SCALINGS: dict[str, tuple[Callable[..., jax.Array], tuple[str, ...]]] = {
    "default": (lambda plain: plain, ()),
    "none": (lambda plain: plain, ()),
    "linear": (lambda plain, factor: plain / factor, ("factor",)),
    "llama3": (_by_wavelength, _LLAMA3_KEYS),
}


def _tree_of_sources(checkpoint: Checkpoint, settings: _Settings) -> tuple[Params, set[str]]:
    """The parameters, with Sources in place of arrays, and the names of all tensors in them."""
    used = set()
    sizes = {
        "width": settings.width,
        "queries": settings.heads * settings.head_size,
        "keys": settings.kv_heads * settings.head_size,
        "hidden": _rows(checkpoint, "model.layers.0.mlp.gate_proj.weight"),
        "vocabulary": _rows(checkpoint, "model.embed_tokens.weight"),
    }

    def value_of(name: str, *axes: str) -> Any:
        if name not in checkpoint:
            raise ValueError(f"{checkpoint.path} is not a complete Llama model: it lacks {name!r}.")
        used.add(name)
        shape = tuple(sizes[axis] for axis in axes)
        if checkpoint[name].shape != shape:
            raise ValueError(
                f"{checkpoint.path}: {name} must have the shape {shape} ({', '.join(axes)}), which "
                f"follows from the configuration; got {checkpoint[name].shape}."
            )
        return checkpoint[name].value

    def dense(name: str, rows: str, columns: str) -> Params:
        bias = f"{name}.bias"
        kernel = {"kernel": value_of(f"{name}.weight", rows, columns)}
        return {**kernel, "bias": value_of(bias, rows)} if bias in checkpoint else kernel

    def layer(i: int) -> Params:
        prefix = f"model.layers.{i}."
        norms = {name: value_of(f"{prefix}{n}.weight", "width") for name, n in _NORMS.items()}
        return norms | {name: dense(f"{prefix}{n}", *axes) for name, (n, *axes) in _KERNELS.items()}

    layers = [layer(i) for i in range(settings.layers)]
    runs = [list(run) for _, run in itertools.groupby(layers, _kind)]
    tree = {
        "embedding": value_of("model.embed_tokens.weight", "vocabulary", "width"),
        "layers": tuple(jax.tree.map(lambda *s: checkpoints.stack(s), *run) for run in runs),
        "norm": value_of("model.norm.weight", "width"),
    }
    is_tied = checkpoint.metadata.get("config", {}).get("tie_word_embeddings") is not False
    if "lm_head.weight" in checkpoint or not is_tied:
        tree["head"] = value_of("lm_head.weight", "vocabulary", "width")
    return tree, used


def _rows(checkpoint: Checkpoint, name: str) -> int:
    """The length of the first axis; 0 if there is none."""
    return next(iter(checkpoint[name].shape), 0) if name in checkpoint else 0


def _kind(layer: Params) -> Any:
    """Equal for layers that can be stacked."""
    leaves, structure = jax.tree.flatten(layer)
    return structure, [(x.shape, x.dtype) for x in leaves]


def _is_stored(x: Any) -> bool:
    return isinstance(x, Source | QTensor)


def _check_all_used(checkpoint: Checkpoint, used: set[str]) -> None:
    left = [n for n in checkpoint if n not in used and n != _GGUF_FACTORS and _DERIVED not in n]
    if left:
        raise ValueError(
            f"{checkpoint.path} has tensors that a Llama model does not have: "
            f"{', '.join(left[:4])}{', ...' if left[4:] else ''}. Run it with jq.lift."
        )
