"""Computations on raw arrays that decide speed, one formulation per file."""

from .integer_dot import integer_dot as integer_dot
