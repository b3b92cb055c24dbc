"""Layers with one kernel, which may be quantized."""

from typing import Any

import jax
import keras

from .lora import LoraMixin


class KernelLayerMixin(LoraMixin):
    """Keras layers that multiply once with `kernel`, then add a bias and apply an activation.

    A subclass defines `product`.
    """

    data_format = "channels_last"

    def product(self, inputs: jax.Array, kernel: Any) -> jax.Array:
        """Hook: the layer's product, before bias and activation."""
        raise NotImplementedError(f"{type(self).__name__} must define `product`.")

    def call(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """The forward pass: that of Keras in float, or on codes if the kernel is quantized."""
        if not self.has_codes("kernel"):
            return super().call(inputs, *args, **kwargs)
        return self._finished(self.adapted_product(inputs))

    def adapted_product(self, inputs: jax.Array) -> jax.Array:
        """Hook: the product with the quantized kernel and its adapter, if it has one."""
        return self.product(inputs, self.lora_operand("kernel"))

    def _finished(self, outputs):
        if self.bias is not None:
            axis = CHANNEL_AXIS[self.data_format] % outputs.ndim
            ones = (1,) * (outputs.ndim - axis - 1)
            outputs = outputs + keras.ops.reshape(self.bias, (*self.bias.shape, *ones))
        return outputs if self.activation is None else self.activation(outputs)


CHANNEL_AXIS = {"channels_last": -1, "channels_first": 1}
