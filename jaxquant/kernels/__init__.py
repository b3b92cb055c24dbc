"""Performance-critical computations on raw arrays, one implementation per file."""

from .integer_dot import integer_dot as integer_dot
