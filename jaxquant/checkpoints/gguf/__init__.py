"""GGUF files, which llama.cpp and Ollama use."""

from .reader import open_gguf as open_gguf
