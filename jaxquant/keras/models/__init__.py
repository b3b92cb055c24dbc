"""Whole Keras models: converted, quantized, and as pure functions."""

from .convert import convert as convert
from .convert import to_stock as to_stock
from .functional import functional as functional
from .in_place import quantize_in_place as quantize_in_place
from .load_preset import load_preset as load_preset
from .load_weights import load_weights as load_weights
from .quantize import quantize as quantize
