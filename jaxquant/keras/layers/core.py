"""Dense layers and embeddings."""

import keras
import numpy as np

from ...ops import einsum, matmul, take
from .. import compat
from ..files import StockMatrix
from ..layer import Float8TrainingMixin, LoraMixin, QuantizedWeight

_register = keras.saving.register_keras_serializable(package="jaxquant")


@_register
class Dense(Float8TrainingMixin, keras.layers.Dense):
    """`keras.layers.Dense`, quantizable: (..., K) -> (..., units)."""

    kernel: QuantizedWeight = QuantizedWeight(axis=0)

    def product(self, inputs, kernel):
        """inputs @ kernel."""
        return matmul(inputs, kernel)


def _labels(layer):
    """Labels of the kernel's axes, and of the output's with a dot for each axis in "..."."""
    operands, output = layer.equation.split("->")
    inputs, kernel = operands.split(",")
    elided = layer.input_spec.ndim - len(inputs.replace("...", ""))
    return kernel, output.replace("...", "." * elided)


def _contracted(layer):
    """Axes of the kernel whose labels are not in the equation's output."""
    operands, output = layer.equation.split("->")
    kernel = operands.split(",")[1]
    return tuple(i for i, label in enumerate(kernel) if label not in output)


@_register
class EinsumDense(Float8TrainingMixin, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense`, quantizable, with any equation."""

    kernel: QuantizedWeight = QuantizedWeight(axis=_contracted, is_matrix=True)

    def product(self, inputs, kernel):
        """The equation."""
        return einsum(self.equation, inputs, kernel)

    def stock_scale_shape(self, name, like):
        """Hook: laid out like the output, with 1 for axes that the kernel does not have."""
        kernel, output = _labels(self)
        sizes = dict(zip(kernel, like.scale.shape, strict=True))
        return tuple(sizes.get(label, 1) for label in output)

    def scale_to_stock(self, name, scale, like):
        """Hook: in the order of the output's axes."""
        return scale.transpose(self._output_order()).reshape(self.stock_scale_shape(name, like))

    def scale_from_stock(self, name, scale, like):
        """Hook: undoes `scale_to_stock`."""
        order = self._output_order()
        lengths = [like.scale.shape[a] for a in order]
        return scale.reshape(lengths).transpose(np.argsort(order))

    def _output_order(self):
        """The kernel's axes, contracted ones first, then as they come in the output."""
        kernel, output = _labels(self)
        return sorted(range(len(kernel)), key=lambda axis: output.find(kernel[axis]))


@_register
class Embedding(LoraMixin, keras.layers.Embedding):
    """`keras.layers.Embedding`, quantizable: integers (...) -> (..., output_dim)."""

    embeddings: QuantizedWeight = QuantizedWeight(axis=1, inputs=False)

    def stock_matrix(self, name, shape):
        """Hook: the table itself, with groups along each row."""
        rows, columns = shape
        return StockMatrix((rows, columns), 1)

    def call(self, inputs):
        """Looks up rows of the table, and dequantizes those only.

        Raises:
            ValueError: Keras is writing an ONNX file, and the table is quantized.
        """
        if not self.has_codes("embeddings"):
            return super().call(inputs)
        if compat.is_exporting_onnx():
            raise ValueError(
                "ONNX files hold tables in float, because jax2onnx does not support lookups of "
                f"codes; got {self.path or self.name}. Quantize with keep=[{self.name!r}]."
            )
        is_whole = keras.backend.is_int_dtype(inputs.dtype)
        inputs = inputs if is_whole else inputs.astype("int32")
        return take(self.lora_operand("embeddings"), inputs, axis=0)


@_register
class ReversibleEmbedding(Embedding, keras.layers.ReversibleEmbedding):
    """`keras.layers.ReversibleEmbedding`, quantizable.

    Integers (...) -> (..., output_dim). With `reverse=True` (..., output_dim) ->
    (..., input_dim): a product with the table, or with another weight if they are not tied.
    """

    embeddings: QuantizedWeight = QuantizedWeight(axis=1)
    reverse_embeddings = QuantizedWeight(axis=0)

    def call(self, inputs, reverse=False):
        """Rows of the table with their mask, or logits."""
        if reverse:
            return self._project(inputs)
        outputs = super().call(inputs)
        compat.set_mask(outputs, keras.layers.Embedding.compute_mask(self, inputs))
        return outputs

    def compute_mask(self, inputs, mask=None):
        """None: `call` sets the mask, because only it knows whether the inputs are tokens."""
        return None

    def _project(self, inputs):
        name, equation = _PROJECTIONS[self.tie_weights]
        if not self.has_codes(name):
            return super(Embedding, self).call(inputs, reverse=True)
        dtype = self.compute_dtype if self.reverse_dtype is None else self.reverse_dtype
        inputs = inputs.astype(dtype)
        logits = einsum(equation, inputs, self.lora_operand(name).astype(dtype))
        cap = self.logit_soft_cap
        return logits if cap is None else keras.ops.tanh(logits / cap) * cap


# The weight of the reverse product, by whether weights are tied.
_PROJECTIONS = {
    True: ("embeddings", "...d,vd->...v"),
    False: ("reverse_embeddings", "...d,dv->...v"),
}
