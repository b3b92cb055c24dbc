"""Attention: projections that quantize, around Keras' own products of activations."""

import keras

from .composed import ComposedMixin
from .core import EinsumDense

_register = keras.saving.register_keras_serializable(package="jaxquant")
_OURS = {keras.layers.EinsumDense: EinsumDense}


@_register
class MultiHeadAttention(ComposedMixin, keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` with quantizable projections."""

    ours = _OURS


# Keras exports its class under another name than it has; weight-file paths have this one.
@_register
class GroupedQueryAttention(ComposedMixin, keras.layers.GroupQueryAttention):
    """`keras.layers.GroupQueryAttention` with quantizable projections."""

    ours = _OURS


GroupQueryAttention = GroupedQueryAttention
