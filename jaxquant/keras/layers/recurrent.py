"""Recurrent cells, quantizable, and the layers that run them."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import keras

from ...core import QTensor
from ...ops import matmul
from ..layer import QuantizableMixin, QuantizedWeight
from .composed import ComposedMixin

_register = keras.saving.register_keras_serializable(package="jaxquant")


class CellMixin(QuantizableMixin):
    """A Keras cell with two products: of the inputs (B, K), and of the state (B, units).

    A subclass defines `step`.
    """

    kernel: QuantizedWeight = QuantizedWeight(axis=0)
    recurrent_kernel: QuantizedWeight = QuantizedWeight(axis=0)
    # Of the Keras cell.
    activation: Any
    recurrent_activation: Any
    bias: Any

    def step(
        self,
        inputs: jax.Array,
        states: tuple[jax.Array, ...],
        kernel: QTensor | jax.Array,
        recurrent_kernel: QTensor | jax.Array,
    ) -> tuple[jax.Array, ...]:
        """Hook: one step with one product per kernel; returns the new states."""
        raise NotImplementedError(f"{type(self).__name__} must define `step`.")

    def call(self, inputs: jax.Array, states: Any, training: bool = False) -> Any:
        """One step: on codes if a kernel is quantized and `step` computes what the cell does."""
        names = "kernel", "recurrent_kernel"
        if self._is_split(training) or not any(self.has_codes(name) for name in names):
            return super().call(inputs, states, training=training)
        kernels = [self.operand(name) for name in names]
        is_nested = isinstance(states, list | tuple)
        new_states = self.step(inputs, tuple(states) if is_nested else (states,), *kernels)
        return new_states[0], list(new_states) if is_nested else new_states[0]

    def _is_split(self, training):
        """Whether the cell splits its kernels by gate, or applies dropout masks."""
        is_masked = training and (self.dropout or self.recurrent_dropout)
        is_fused = getattr(self, "implementation", 2) != 1 and getattr(self, "reset_after", True)
        return bool(is_masked) or not is_fused


@_register
class SimpleRNNCell(CellMixin, keras.layers.SimpleRNNCell):
    """`keras.layers.SimpleRNNCell`, quantizable: (B, K) -> (B, units)."""

    def step(self, inputs, states, kernel, recurrent_kernel):
        """activation(inputs @ kernel + bias + state @ recurrent_kernel)."""
        inputs = matmul(inputs, kernel)
        if self.bias is not None:
            inputs = inputs + self.bias
        outputs = inputs + matmul(states[0], recurrent_kernel)
        return (outputs if self.activation is None else self.activation(outputs),)


@_register
class LSTMCell(CellMixin, keras.layers.LSTMCell):
    """`keras.layers.LSTMCell`, quantizable: (B, K) -> (B, units).

    Source: Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735.
    """

    def step(self, inputs, states, kernel, recurrent_kernel):
        """carry' = forget * carry + keep * candidate; state' = output * activation(carry')."""
        state, carry = states
        gates = matmul(inputs, kernel) + matmul(state, recurrent_kernel)
        if self.use_bias:
            gates = gates + self.bias
        keep, forget, candidate, output = jnp.split(gates, 4, axis=1)
        keep, forget, output = (self.recurrent_activation(x) for x in (keep, forget, output))
        carry = forget * carry + keep * self.activation(candidate)
        return output * self.activation(carry), carry


@_register
class GRUCell(CellMixin, keras.layers.GRUCell):
    """`keras.layers.GRUCell`, quantizable: (B, K) -> (B, units).

    With `reset_after=True` it computes on codes. With False it multiplies parts of the kernel one
    by one, and uses the dequantized kernel.

    Source: Cho et al. 2014, arXiv:1406.1078.
    """

    def step(self, inputs, states, kernel, recurrent_kernel):
        """state' = update * state + (1 - update) * candidate."""
        (state,) = states
        gates, recurrent = matmul(inputs, kernel), matmul(state, recurrent_kernel)
        if self.use_bias:
            gates, recurrent = gates + self.bias[0], recurrent + self.bias[1]
        update, reset, candidate = jnp.split(gates, 3, axis=-1)
        from_update, from_reset, from_state = jnp.split(recurrent, 3, axis=-1)
        update = self.recurrent_activation(update + from_update)
        reset = self.recurrent_activation(reset + from_reset)
        candidate = self.activation(candidate + reset * from_state)
        return (update * state + (1 - update) * candidate,)


class RecurrentMixin(ComposedMixin):
    """A Keras recurrent layer that runs a quantizable cell."""

    ours: ClassVar[dict[type, type]] = {
        keras.layers.SimpleRNNCell: SimpleRNNCell,
        keras.layers.LSTMCell: LSTMCell,
        keras.layers.GRUCell: GRUCell,
    }


@_register
class SimpleRNN(RecurrentMixin, keras.layers.SimpleRNN):
    """`keras.layers.SimpleRNN`, quantizable: (B, T, K) -> (B, units)."""


@_register
class LSTM(RecurrentMixin, keras.layers.LSTM):
    """`keras.layers.LSTM`, quantizable: (B, T, K) -> (B, units)."""


@_register
class GRU(RecurrentMixin, keras.layers.GRU):
    """`keras.layers.GRU`, quantizable: (B, T, K) -> (B, units)."""


# Keras' own wrappers, which work with quantized layers.
Bidirectional = keras.layers.Bidirectional
TimeDistributed = keras.layers.TimeDistributed
