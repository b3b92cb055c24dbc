"""Arguments of small backbones of KerasHub, and their inputs."""

from typing import Any

import numpy as np

from . import checks

DECODER: dict[str, Any] = {
    "vocabulary_size": 128,
    "num_layers": 1,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 64,
    "intermediate_dim": 128,
}
ENCODER: dict[str, Any] = {
    "vocabulary_size": 128,
    "num_layers": 1,
    "num_heads": 4,
    "hidden_dim": 64,
    "intermediate_dim": 128,
    "max_sequence_length": 32,
}


def token_inputs(name: str) -> dict[str, np.ndarray]:
    """Two sequences of tokens for the backbone with this name."""
    tokens = np.asarray(checks.tokens())
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    return {**inputs, "segment_ids": tokens % 2} if name == "Bert" else inputs
