"""Checkpoints of models, quantized or not, read lazily and exactly."""

from .checkpoint import Checkpoint as Checkpoint
from .source import Source as Source
from .stored import Stored as Stored
