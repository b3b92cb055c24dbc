"""Rows of the table-driven test."""

from .layer_cases import LayerCase

RECURRENT: list[LayerCase] = []
