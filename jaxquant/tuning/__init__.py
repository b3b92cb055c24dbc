"""Quantization of models layer by layer, and training of their rounding and scales."""

from .distill import distill as distill
from .distill import divergence as divergence
from .sequential import sequential as sequential
