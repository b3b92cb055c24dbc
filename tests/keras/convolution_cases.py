"""Rows of the table-driven test."""

from .layer_cases import LayerCase

CONVOLUTION: list[LayerCase] = []
