"""Quantization of models layer by layer, and training of their rounding."""

from .sequential import sequential as sequential
