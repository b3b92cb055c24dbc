"""Checkpoints of models, quantized or not, read lazily and exactly."""

from .checkpoint import Checkpoint as Checkpoint
from .gguf import open_gguf as open_gguf
from .huggingface import open_folder as open_folder
from .source import Source as Source
from .stored import Stored as Stored
