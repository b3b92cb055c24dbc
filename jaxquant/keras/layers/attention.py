"""Attention with quantizable projections; Keras computes the products of activations."""

import keras

from .composed import ComposedMixin
from .core import EinsumDense

_register = keras.saving.register_keras_serializable(package="jaxquant")
_OURS = {keras.layers.EinsumDense: EinsumDense}


@_register
class MultiHeadAttention(ComposedMixin, keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` with quantizable projections."""

    ours = _OURS


# Keras exports its class as GroupQueryAttention; paths in weight files use this name.
@_register
class GroupedQueryAttention(ComposedMixin, keras.layers.GroupQueryAttention):
    """`keras.layers.GroupQueryAttention` with quantizable projections."""

    ours = _OURS


GroupQueryAttention = GroupedQueryAttention
