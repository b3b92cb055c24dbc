"""Accuracy of methods of quantization on a language model."""

from .rows import CONFIGS as CONFIGS
from .suite import suite as suite
