"""GGUF files, which llama.cpp and Ollama use."""

from .reader import open_gguf as open_gguf
from .writer import write_gguf as write_gguf
