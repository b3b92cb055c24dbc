"""Training in 8-bit floats: e4m3 forward, e5m2 gradients, delayed scaling.

A scale is the step, amax / (largest value of the format), with amax the largest magnitude in the
last steps. Each operand of a product has one, and the gradient of the product's result. Keras
overwrites the variables that hold them by what their gradients are said to be: so a backward
pass here gives the next scale and the next history in the place of gradients. (JAX adds up the
gradients of a layer that runs twice in one step, so such a layer cannot train this way.)

Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3.1.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ...training import amax_of, push_amax
from .. import compat
from ..configs import QuantizationConfig
from .kernel_layer import ProductMixin

FORWARD = "float8_e4m3fn"
BACKWARD = "float8_e5m2"
DEFAULT_HISTORY = 1024


def scale_of(amax: jax.Array, otherwise: jax.Array, dtype: str) -> jax.Array:
    """amax / (largest value of the format), and `otherwise` where amax is zero or not finite."""
    is_known = (amax > 0) & jnp.isfinite(amax)
    # In units of the smallest float32 at least, which a step of zero would not divide by.
    step = jnp.maximum(amax / float(jnp.finfo(dtype).max), jnp.finfo(jnp.float32).tiny)
    return jnp.where(is_known, step, otherwise)


def current_scale(x: jax.Array, scale: jax.Array, history: jax.Array, dtype: str) -> jax.Array:
    """The given scale, or where the history is still empty that of x itself."""
    is_empty = jnp.max(history) == 0
    return jnp.where(is_empty, scale_of(amax_of(x), scale, dtype), scale)


def through(x: jax.Array, scale: jax.Array, dtype: str) -> jax.Array:
    """x rounded to the codes of a format, saturating, and back: its dtype stays.

    NaN and Inf are not hidden: they come back as NaN, or as Inf in a format that has it.
    """
    values = x.astype(jnp.float32) / scale
    largest = float(jnp.finfo(dtype).max)
    clipped = jnp.where(jnp.isfinite(values), jnp.clip(values, -largest, largest), values)
    return (clipped.astype(dtype).astype(jnp.float32) * scale).astype(x.dtype)


def next_scaling(
    x: jax.Array, scale: jax.Array, history: jax.Array, dtype: str
) -> tuple[jax.Array, jax.Array]:
    """The scale and the history for the next step, once x was seen.

    The history moves on by one, with the newest first; amax that is not finite counts as 0.
    """
    history = push_amax(history, amax_of(x))
    return scale_of(jnp.max(history), scale, dtype), history


@jax.custom_vjp
def quantize_operand(x: jax.Array, scale: jax.Array, history: jax.Array) -> jax.Array:
    """An operand as its e4m3 codes stand for it.

    Args:
        x: float array.
        scale: float32 scalar; in the place of its gradient comes the next scale.
        history: float32 (length,); in the place of its gradient comes the next history.

    Returns:
        Shape and dtype of x, to which gradients pass unchanged.
    """
    return through(x, current_scale(x, scale, history, FORWARD), FORWARD)


def _operand_forward(x, scale, history):
    return quantize_operand(x, scale, history), next_scaling(x, scale, history, FORWARD)


def _operand_backward(scaling, gradient):
    return gradient, *scaling


quantize_operand.defvjp(_operand_forward, _operand_backward)


@jax.custom_vjp
def quantize_gradient(y: jax.Array, scale: jax.Array, history: jax.Array) -> jax.Array:
    """y, whose gradient passes as its e5m2 codes stand for it.

    Arguments and their gradients are those of `quantize_operand`.
    """
    return y


def _gradient_forward(y, scale, history):
    return y, (scale, history)


def _gradient_backward(scaling, gradient):
    scale, history = scaling
    rounded = through(gradient, current_scale(gradient, scale, history, BACKWARD), BACKWARD)
    return rounded, *next_scaling(gradient, scale, history, BACKWARD)


quantize_gradient.defvjp(_gradient_forward, _gradient_backward)


class Float8TrainingMixin(ProductMixin):
    """Adds float8 training to a layer of one product: `Float8QuantizationConfig(training=True)`.

    Weights stay float variables. Beside them are for each of `inputs`, `kernel` and
    `outputs_grad` a scale and a history of amax, which are saved after all others.
    """

    def call(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """The forward pass; its products see 8-bit floats while the layer trains in them."""
        if not self.trains_in_float8:
            return super().call(inputs, *args, **kwargs)
        inputs = quantize_operand(inputs, *self._scaling("inputs"))
        kernel = quantize_operand(jnp.asarray(self.operand("kernel")), *self._scaling("kernel"))
        outputs = self.kernel_layer(inputs, kernel)
        return self._finished(quantize_gradient(outputs, *self._scaling("outputs_grad")))

    def start_training(self, config: QuantizationConfig) -> None:
        """Adds the scales.

        Raises:
            ValueError: LoRA is enabled, or the kernel holds NaN or Inf. The layer is left as it
                was.
        """
        if self.lora_enabled:
            raise ValueError(
                f"{self.name!r} must train in float8 without LoRA; got rank {self.lora_rank}. "
                "Save and load it to merge LoRA, then quantize."
            )
        kernel = jnp.asarray(self.float_weights["kernel"].value)
        if not jnp.all(jnp.isfinite(kernel)):
            raise ValueError(
                f"{self.name}/kernel holds NaN or Inf; got shape {kernel.shape}. Mend it, then "
                "quantize."
            )
        with self.all_or_nothing():
            self.quantization_config = config
            for name, shape in zip(SCALING, self.training_shapes(), strict=True):
                setattr(self, name, self._add_scaling(name, shape))
            scale, history = self._scaling("kernel")
            scale, history = next_scaling(kernel, scale, history, FORWARD)
            self.kernel_scale.assign(scale)
            self.kernel_amax_history.assign(history)
        self.switch_policy(config)
        self.renew_optimizers()

    def end_training(self) -> None:
        """Drops the scales."""
        with compat.unlocked(self):
            for name in SCALING:
                compat.drop_variable(self, self.__dict__.pop(name))
        self.renew_optimizers()

    def training_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the scales and histories, in their order."""
        length = getattr(self.dtype_policy, "amax_history_length", DEFAULT_HISTORY)
        return [(), (length,)] * 3

    def _scaling(self, name):
        pair = (getattr(self, f"{name}_{part}") for part in ("scale", "amax_history"))
        return [jnp.asarray(variable.value) for variable in pair]

    def _add_scaling(self, name, shape):
        return self.add_weight(
            name=name,
            shape=shape,
            initializer="zeros" if shape else "ones",
            dtype="float32",
            # The optimizer takes their gradients for their next values.
            trainable=True,
            autocast=False,
            overwrite_with_gradient=True,
        )


# The names of the variables, in their order.
SCALING = [
    f"{of}_{part}"
    for of in ("inputs", "kernel", "outputs_grad")
    for part in ("scale", "amax_history")
]
