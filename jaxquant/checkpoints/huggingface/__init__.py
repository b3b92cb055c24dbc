"""Folders of the Hugging Face Hub: safetensors files, quantized by one of many methods."""

from .families import open_folder as open_folder
from .write import write_folder as write_folder
