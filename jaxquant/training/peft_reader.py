"""Reads adapters of Hugging Face's PEFT into a tree."""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import LowRank
from ..tree import is_quantized
from ..tree.internal import MALFORMED, leaves_with_paths, read_arrays, summary
from .peft import CONFIG, PREFIX, WEIGHTS, has_outputs_first, layer_name, stack_of

# What would change the model if it were ignored, and the values that are supported.
_SUPPORTED = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "lora_bias": (False, None),
}


def load_peft(
    path: str | os.PathLike[str],
    params: Any,
    names: Mapping[str, str] | Callable[[str], str] | None = None,
) -> Any:
    """Reads adapters that `save_peft` or Hugging Face's PEFT wrote, the inverse of `save_peft`.

    Ranks may differ from those of `params`, and between layers: `rank_pattern`, `alpha_pattern` and
    `use_rslora` are applied, and DoRA's magnitudes are read. Adapters that started with PiSSA or
    LoftQ belong to the base that they were trained on.

    Args:
        path: of the folder.
        params: tree from `lora_init`, whose adapters are replaced. Its base is kept.
        names: as for `save_peft`.

    Returns:
        The tree with the adapters of the file, in the dtypes of the file.

    Raises:
        OSError: a file is missing.
        ValueError: the tree does not contain adapters, a layer is not in the file, or one of the
            file not in the tree; shapes do not match; only one of both has norms (DoRA); layers of
            a stack differ in rank or alpha; the file has something else than adapters of linear
            layers, such as trained biases; or a file is damaged.

    Error: none.
    Source: PEFT's `LoraConfig`, `get_pattern_key` and `LoraLayer.update_layer`.

    Example:
        >>> rules, key = jq.Rule("*/kernel", jq.W8A16), jax.random.key(0)
        >>> params = {"q_proj": {"kernel": jnp.ones((4, 2))}}
        >>> trained = jq.training.lora_init(params, rules, rank=3, key=key)
        >>> jq.training.save_peft("adapters", trained)
        >>> start = jq.training.lora_init(params, rules, rank=1, key=key)
        >>> jq.training.load_peft("adapters", start)["q_proj"]["kernel"].rank
        3
    """
    folder = pathlib.Path(path)
    config = _read_config(folder / CONFIG)
    tensors = read_arrays(folder / WEIGHTS)
    paths, leaves, treedef = leaves_with_paths(params, is_quantized)
    if not any(isinstance(x, LowRank) for x in leaves):
        raise ValueError(
            "load_peft expects a tree from lora_init; got one without adapters, with paths "
            f"{', '.join(paths[:8]) or 'none'}."
        )
    read = _Reader(folder, config, tensors)
    found = [
        read.layer(layer_name(names, p, x), p, x) if isinstance(x, LowRank) else x
        for p, x in zip(paths, leaves, strict=True)
    ]
    left = sorted(set(tensors) - read.used)
    if left:
        raise ValueError(
            f"{folder} has {left[:4]}, which are not of a layer with adapters in the tree; its "
            f"layers are {sorted(read.layers)[:8]}. Give them adapters by the rules of lora_init, "
            "or their names by `names`."
        )
    return jax.tree.unflatten(treedef, found)


def _read_config(path):
    """The entries of a config of PEFT, of which those that are read are checked."""
    try:
        config = dict(json.loads(path.read_bytes()))
    except MALFORMED as error:
        raise ValueError(
            f"{path} is not a JSON object, {summary(error)}. Copy it again."
        ) from error
    for name, values in _SUPPORTED.items():
        if config.get(name) not in values:
            raise ValueError(
                f"{path} must have {name}={values[0]!r}, as adapters of linear layers do; got "
                f"{config.get(name)!r}. Train with it."
            )
    patterns = config.get("alpha_pattern") or {}
    alphas = (
        [config.get("lora_alpha"), *patterns.values()] if isinstance(patterns, dict) else [None]
    )
    if not all(_is_number(x) for x in alphas):
        raise ValueError(
            f"{path} must have a number as lora_alpha, and numbers in alpha_pattern; got "
            f"lora_alpha={config.get('lora_alpha')!r} and alpha_pattern={patterns!r}. Copy it "
            "again."
        )
    return config


def _is_number(x):
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


class _Reader:
    """The adapters of a file.

    Attributes:
        used: names of tensors that were read.
        layers: names of layers that were asked for.
    """

    def __init__(self, folder: pathlib.Path, config: dict[str, Any], tensors: dict[str, Any]):
        self._folder, self._config, self._tensors = folder, config, tensors
        self.used: set[str] = set()
        self.layers: set[str] = set()

    def layer(self, name: str, path: str, x: LowRank) -> LowRank:
        """An array with the adapters of a layer, or of those of a stack."""
        split, stack = stack_of(x)
        counts = x.shape[:stack]
        indices = list(np.ndindex(counts))
        layers = [name.format(*index) if stack else name for index in indices]
        first = has_outputs_first(x, split)
        pairs = [self._factors(layer, first) for layer in layers]
        inner = x.shape[stack:split], x.shape[split:]
        sizes = tuple(map(math.prod, inner))
        for layer, (a, b) in zip(layers, pairs, strict=True):
            rank = b.shape[:1]
            if (a.shape, b.shape) != ((sizes[0], *rank), (*rank, sizes[1])) or rank == (0,):
                raise ValueError(
                    f"{layer} must have factors for {path}, {sizes[0]} and {sizes[1]}; got "
                    f"{a.shape} and {b.shape} in {self._folder}. Check `names`."
                )
        ranks = [a.shape[1] for a, _ in pairs]
        weights = {(r, self._alpha(n, r)) for n, r in zip(layers, ranks, strict=True)}
        if len(weights) != 1:
            raise ValueError(
                f"{path} is a stack, whose layers must have one rank and alpha; got "
                f"{sorted(weights)} in {self._folder}. Unstack its layers."
            )
        ((rank, alpha),) = weights
        a = np.stack([a for a, _ in pairs]).reshape(*counts, *inner[0], rank)
        b = np.stack([b for _, b in pairs]).reshape(*counts, rank, *inner[1])
        norm = self._magnitude(layers, x)
        arrays = {"a": jnp.asarray(a), "b": jnp.asarray(b), "magnitude": norm}
        return dataclasses.replace(x, **arrays, alpha=alpha)

    def _factors(self, layer, has_outputs_first):
        """(a, b) of a layer: of its input and output axes, in their order in the array."""
        down, up = (self._take(layer, f"lora_{side}.weight") for side in "AB")
        return (up, down) if has_outputs_first else (down.T, up.T)

    def _take(self, layer, part):
        name = f"{PREFIX}{layer}.{part}"
        self.layers.add(layer)
        if name not in self._tensors:
            raise ValueError(
                f"{self._folder} must have {name!r}; it has {sorted(self._tensors)[:4]}. Check "
                "`names`."
            )
        self.used.add(name)
        return self._tensors[name]

    def _magnitude(self, layers, x):
        has_norms = bool(self._config.get("use_dora"))
        if has_norms != (x.magnitude is not None):
            raise ValueError(
                f"{self._folder} has use_dora={has_norms}, unlike the tree. Call "
                f"lora_init(..., use_dora={has_norms})."
            )
        if not has_norms:
            return None
        norms = [self._take(layer, "lora_magnitude_vector") for layer in layers]
        size = x.magnitude.size // len(layers)
        for layer, norm in zip(layers, norms, strict=True):
            if norm.size != size:
                raise ValueError(
                    f"{layer} must have {size} magnitudes; got {norm.shape} in {self._folder}. "
                    "Check `names`."
                )
        return jnp.asarray(np.stack(norms).reshape(x.magnitude.shape))

    def _alpha(self, layer, rank):
        """alpha, such that the product is weighted by alpha / rank."""
        patterns = self._config.get("alpha_pattern") or {}
        matching = (v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", layer))
        alpha = float(next(matching, self._config["lora_alpha"]))
        return alpha * math.sqrt(rank) if self._config.get("use_rslora") else alpha
