"""Adapters in files, under the names of Hugging Face's PEFT."""

import collections
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..core import LowRank
from ..tree import is_quantized
from ..tree.internal import creating_folder, leaves_with_paths, replacing, write_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


class _Module(NamedTuple):
    """The adapters of one linear layer, as PEFT has them.

    Attributes:
        name: of the layer.
        a: (rank, inputs), b: (outputs, rank).
        magnitude: (outputs,), or None.
        alpha: b a is multiplied by alpha / rank.
    """

    name: str
    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    alpha: float


def save_peft(
    path: str | os.PathLike[str],
    params: Any,
    names: Mapping[str, str] | Callable[[str], str] | None = None,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Writes the adapters of a tree to a folder that Hugging Face's PEFT opens.

        adapter_config.json           rank, alpha, modules, DoRA
        adapter_model.safetensors     base_model.model.<layer>.lora_A.weight (rank, inputs)
                                      base_model.model.<layer>.lora_B.weight (outputs, rank)
                                      base_model.model.<layer>.lora_magnitude_vector (outputs,)

    PEFT adds (alpha / rank) lora_B lora_A to the weight (outputs, inputs) of a linear layer, which
    is a @ b of a kernel (inputs, outputs). Kernels with several input or output axes are written as
    matrices. Where the scales of the base lie along its last axis, as in PyTorch's layout, a has
    the outputs. The base is not written: adapters that started with `PiSSA` or `LoftQ` need theirs.

    Args:
        path: of the folder, new or empty.
        params: tree from `lora_init`, trained.
        names: {path: name of the layer in the PyTorch model}, or a function of the path. None for
            the path with dots, without its last part: "layers/0/q/kernel" is "layers.0.q". For
            stacked layers the name has a place for the number: "model.layers.{}.self_attn.q_proj".
        base_model: name or path of the model, for PEFT.
        task_type: such as "CAUSAL_LM", for PEFT.

    Raises:
        ValueError: the tree does not contain adapters, a name is missing, two layers have one name,
            a stack has a name without a place for the number, or only some layers have norms.
        FileExistsError: there is something other than an empty folder at `path`.

    Error: none, arrays keep their dtype. `LowRank.alpha` is written as `lora_alpha`, so that
        adapters of `use_rslora` are written with the same product and "use_rslora": false.
    Source: PEFT's `get_peft_model_state_dict` and `get_pattern_key`; Hu et al. 2021 (LoRA),
        arXiv:2106.09685.

    Example:
        >>> import os
        >>> rules, key = jq.Rule("*/kernel", jq.W8A16), jax.random.key(0)
        >>> params = {"q_proj": {"kernel": jnp.ones((4, 2))}}
        >>> params = jq.training.lora_init(params, rules, rank=1, key=key)
        >>> jq.training.save_peft("adapters", params)
        >>> sorted(os.listdir("adapters"))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    paths, leaves, _ = leaves_with_paths(params, is_quantized)
    found = [(p, x) for p, x in zip(paths, leaves, strict=True) if isinstance(x, LowRank)]
    if not found:
        raise ValueError(
            "save_peft expects a tree from lora_init; got one without adapters, with paths "
            f"{', '.join(paths[:8]) or 'none'}."
        )
    modules = [m for p, x in found for m in _modules(layer_name(names, p, x), x)]
    _check(modules)
    tensors = {}
    for m in modules:
        tensors[f"{PREFIX}{m.name}.lora_A.weight"] = m.a
        tensors[f"{PREFIX}{m.name}.lora_B.weight"] = m.b
        if m.magnitude is not None:
            tensors[f"{PREFIX}{m.name}.lora_magnitude_vector"] = m.magnitude
    config = _config(modules) | {"base_model_name_or_path": base_model, "task_type": task_type}
    with creating_folder(path) as folder:
        with replacing(folder / WEIGHTS) as file:
            write_tensors(file, tensors, {"format": "pt"})
        with replacing(folder / CONFIG) as file:
            file.write(json.dumps(config, indent=2, sort_keys=True).encode())


def _check(modules):
    repeated = [n for n, count in collections.Counter(m.name for m in modules).items() if count > 1]
    if repeated:
        raise ValueError(f"Each layer needs its own name; got {repeated[0]!r} for several paths.")
    without = [m.name for m in modules if m.magnitude is None]
    if 0 < len(without) < len(modules):
        raise ValueError(
            f"PEFT has DoRA in all layers or in none; got {without[0]!r} without norms, and others "
            "with them. Give all of them the same use_dora in lora_init."
        )


def layer_name(
    names: Mapping[str, str] | Callable[[str], str] | None, path: str, x: LowRank
) -> str:
    """The name of the layer at a path, with a place for the number if it is a stack.

    Raises:
        ValueError: the path does not have a name, or the name of a stack does not have that place.
    """
    name = _name(names, path)
    if stack_of(x)[1] and "{}" not in name:
        raise ValueError(
            f"{path} is a stack of {x.shape[0]} layers, whose name needs a place for the number, "
            f"such as 'layers.{{}}.q_proj'; got {name!r}."
        )
    return name


def stack_of(x: LowRank) -> tuple[int, int]:
    """(the first axis of `b`, the number of axes of the stack)."""
    split = x.a.ndim - 1
    return split, split + x.b.ndim - 1 - x.ndim


def _name(names, path):
    if callable(names):
        return names(path)
    if names is None:
        return path.replace("/", ".").rpartition(".")[0] or path
    if path not in names:
        raise ValueError(
            f"names must have the layer of each path with adapters; got {dict(names)}, without "
            f"{path!r}."
        )
    return names[path]


def _modules(name: str, x: LowRank) -> Iterator[_Module]:
    """The linear layers of an array with adapters: one, or those of a stack."""
    split, stack = stack_of(x)
    counts = x.shape[:stack]
    rows = np.asarray(x.a).reshape(*counts, -1, x.rank)
    columns = np.asarray(x.b).reshape(*counts, x.rank, -1)
    norms = None if x.magnitude is None else np.asarray(x.magnitude).reshape(*counts, -1)
    for index in np.ndindex(counts):
        left, right = rows[index], columns[index]
        a, b = (right, left) if has_outputs_first(x, split) else (left.T, right.T)
        norm = None if norms is None else _stored(norms[index])
        yield _Module(name.format(*index) if stack else name, _stored(a), _stored(b), norm, x.alpha)


def _stored(x):
    return np.asarray(x, x.dtype.newbyteorder("<"), order="C")


def has_outputs_first(x: LowRank, split: int) -> bool:
    """Whether `a` has the outputs: the norms or scales of the base are shared along `b`'s axes."""
    shared = x.magnitude if x.magnitude is not None else x.base.reorder(None).scale
    is_shared = [count < n for count, n in zip(shared.shape, x.shape, strict=True)]
    return any(is_shared[split:]) and not any(is_shared[:split])


def _config(modules: list[_Module]) -> dict[str, Any]:
    """The config of PEFT, with the most frequent rank and alpha, and those of other layers."""
    ranks = {m.name: m.a.shape[0] for m in modules}
    alphas = {m.name: int(m.alpha) if m.alpha == int(m.alpha) else m.alpha for m in modules}
    (rank, _), *_ = collections.Counter(ranks.values()).most_common()
    (alpha, _), *_ = collections.Counter(alphas.values()).most_common()
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        # Patterns are regular expressions.
        "rank_pattern": {re.escape(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(n): x for n, x in alphas.items() if x != alpha},
        "target_modules": sorted(ranks),
        "use_dora": modules[0].magnitude is not None,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
    }
