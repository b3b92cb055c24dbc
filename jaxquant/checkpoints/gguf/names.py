"""The names that tensors of GGUF files have in models of Hugging Face, by architecture.

Converters to GGUF rename tensors, and for some architectures change them: they permute the rows of
the query and key projections, so that RoPE rotates neighbouring elements, and add one to the
weights of RMS norms. The table of llama.cpp's converters is `TensorNameMap` of the package `gguf`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_AROUND_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<end>weight|bias)")
_NORM = re.compile(r"(\w+_)?norm")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How the tensors of an architecture differ from those of Hugging Face.

    Attributes:
        layer: names of the parts of a layer.
        heads: for each part whose rows are permuted, the key of its number of heads.
        norm_shift: what is added to the weights of norms.
    """

    layer: Mapping[str, str]
    heads: Mapping[str, str] = dataclasses.field(default_factory=dict)
    norm_shift: int = 0


_COUNTS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
_NEIGHBOURS = Architecture(_LAYER, _COUNTS)
ARCHITECTURES = {
    "llama": _NEIGHBOURS,
    "granite": _NEIGHBOURS,
    "smollm3": _NEIGHBOURS,
    "qwen2": Architecture(_LAYER),
    "qwen3": Architecture(_LAYER | _HEAD_NORMS),
    "phi3": Architecture(_FUSED),
    "gemma": Architecture(_LAYER, norm_shift=1),
    "gemma2": Architecture(_LAYER | _AROUND_NORMS, norm_shift=1),
    "gemma3": Architecture(_LAYER | _AROUND_NORMS | _HEAD_NORMS, norm_shift=1),
}


@dataclasses.dataclass(frozen=True)
class Renamed:
    """What a tensor is in a model of Hugging Face.

    Attributes:
        name: of the tensor.
        rows: for each of its rows, the row of the file; None for the same.
        shift: what the file adds to its elements.
    """

    name: str
    rows: np.ndarray | None = None
    shift: int = 0


Rename = Callable[[str, tuple[int, ...]], Renamed]


def stored_names(path: Any, metadata: Mapping[str, Any]) -> Rename:
    """Tensors under the names of the file, as they are."""
    return lambda name, shape: Renamed(name)


class HuggingFaceNames:
    """Tensors as in models of Hugging Face. Those that no such model has keep their names.

    Raises:
        ValueError: the architecture has no table.
    """

    def __init__(self, path: Any, metadata: Mapping[str, Any]):
        self.path: Any = path
        self.metadata: Mapping[str, Any] = metadata
        self.prefix: Any = metadata.get("general.architecture")
        if self.prefix not in ARCHITECTURES:
            raise ValueError(
                f"{path}: general.architecture: {self.prefix!r} has no table of Hugging Face's "
                f"names; {', '.join(ARCHITECTURES)} have. Open it with names='stored'."
            )
        self.architecture: Architecture = ARCHITECTURES[self.prefix]

    def __call__(self, name: str, shape: tuple[int, ...]) -> Renamed:
        """What the tensor of a name and a shape is called."""
        match = _NAME.fullmatch(name)
        layer, part = (match["layer"], match["part"]) if match else (None, "")
        known = _MODEL if layer is None else self.architecture.layer
        if match is None or part not in known:
            return Renamed(name)
        prefix = "" if layer is None else f"model.layers.{layer}."
        return Renamed(
            f"{prefix}{known[part]}.{match['end']}",
            self._rows(part, int(layer or 0), shape) if part in self.architecture.heads else None,
            self.architecture.norm_shift if _NORM.fullmatch(part) else 0,
        )

    def _rows(self, part, layer, shape) -> np.ndarray:
        """Rows of the file in the order of Hugging Face: per head, all first elements of pairs."""
        key = f"{self.prefix}.{self.architecture.heads[part]}"
        # Models whose queries and keys have the same heads may leave the second number out.
        heads = self.metadata.get(key, self.metadata.get(f"{self.prefix}.attention.head_count"))
        heads = heads[layer] if isinstance(heads, list) and layer < len(heads) else heads
        rows = shape[0] if shape else 0
        if type(heads) is not int or heads < 1 or rows % (2 * heads):
            raise ValueError(
                f"{self.path}: {key}: must be a number of heads that divides the {rows} rows of "
                f"layer {layer}'s {part} into pairs; got {heads!r}. The file is damaged; copy it "
                "again, or open it with names='stored'."
            )
        pairs = np.arange(rows).reshape(heads, rows // heads // 2, 2)
        return pairs.swapaxes(1, 2).reshape(-1)


NAMES: dict[str, Callable[[Any, Mapping[str, Any]], Rename]] = {
    "stored": stored_names,
    "huggingface": HuggingFaceNames,
}
