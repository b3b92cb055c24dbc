"""Dense products and tables."""

import keras

from ...core import QTensor
from ...ops import einsum, matmul, take
from ..lora import LoraMixin
from ..product import ProductMixin
from ..weights import QuantizedWeight

_register = keras.saving.register_keras_serializable(package="jaxquant")


@_register
class Dense(ProductMixin, keras.layers.Dense):
    """`keras.layers.Dense`, quantizable: (..., K) -> (..., units)."""

    kernel = QuantizedWeight(axis=0)

    def product(self, inputs, kernel):
        """inputs @ kernel."""
        return matmul(inputs, kernel)


def _contracted(layer):
    """Axes of the kernel whose labels the equation's output lacks."""
    operands, output = layer.equation.split("->")
    kernel = operands.split(",")[1]
    return tuple(i for i, label in enumerate(kernel) if label not in output)


@_register
class EinsumDense(ProductMixin, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense`, quantizable, with any equation."""

    kernel = QuantizedWeight(axis=_contracted)

    def product(self, inputs, kernel):
        """The equation."""
        return einsum(self.equation, inputs, kernel)


@_register
class Embedding(LoraMixin, keras.layers.Embedding):
    """`keras.layers.Embedding`, quantizable: whole numbers (...) -> (..., output_dim)."""

    embeddings = QuantizedWeight(axis=1, inputs=False)

    def call(self, inputs):
        """Rows of the table, dequantized after they are taken."""
        table = self.operand("embeddings")
        if not isinstance(table, QTensor) or self.lora_enabled:
            return super().call(inputs)
        is_whole = keras.backend.is_int_dtype(inputs.dtype)
        return take(table, inputs if is_whole else inputs.astype("int32"), axis=0)
