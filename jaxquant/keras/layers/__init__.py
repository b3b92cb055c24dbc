"""Keras' layers, quantizable, under their own names: weight-file paths depend on these."""

from .core import Dense as Dense
from .core import EinsumDense as EinsumDense
from .core import Embedding as Embedding
