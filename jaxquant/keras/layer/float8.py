"""Training in float8: e4m3 forward, e5m2 gradients, delayed scaling.

The inputs, the kernel and the gradient of the outputs each have a scale, amax / (largest value of
the format), and a history of amax, the largest magnitude in the last steps. Keras overwrites these
variables with their gradients, and `jaxquant.training` returns their next values there.

Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3.1.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ...training.internal import FORWARD, cast_gradient, cast_operand, next_scaling
from .. import compat
from ..configs import SchemeConfig
from .kernel_layer import KernelLayerMixin

DEFAULT_HISTORY = 1024


class Float8TrainingMixin(KernelLayerMixin):
    """Adds float8 training to a kernel layer: `Float8QuantizationConfig(training=True)`.

    Weights stay float variables. `inputs`, `kernel` and `outputs_grad` each get a scale and a
    history of amax, which are saved after all other variables.
    """

    def call(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """The forward pass, with operands rounded to float8 during float8 training."""
        if not self.trains_in_float8:
            return super().call(inputs, *args, **kwargs)
        inputs = cast_operand(inputs, *self._scaling("inputs"))
        kernel = cast_operand(jnp.asarray(self.operand("kernel")), *self._scaling("kernel"))
        outputs = self.product(inputs, kernel)
        return self._finished(cast_gradient(outputs, *self._scaling("outputs_grad")))

    def start_training(self, config: SchemeConfig) -> None:
        """Adds the scales.

        Raises:
            ValueError: as for `check_training`. The layer is unchanged.
        """
        self.check_training()
        kernel = jnp.asarray(self.float_weights["kernel"].value)
        with self.weight_state.all_or_nothing():
            self.quantization_config = config
            for name, shape in zip(SCALING, self.training_shapes(), strict=True):
                setattr(self, name, self._add_scaling(name, shape))
            scale, history = self._scaling("kernel")
            scale, history = next_scaling(kernel, scale, history, FORWARD)
            self.kernel_scale.assign(scale)
            self.kernel_amax_history.assign(history)
        self.switch_policy(config)
        self.renew_optimizers()

    def check_training(self) -> None:
        """Checks that training can start.

        Raises:
            ValueError: LoRA is enabled, or the kernel holds NaN or Inf.
        """
        if self.lora_enabled:
            raise ValueError(
                f"{self.name!r} must train in float8 without LoRA; got rank {self.lora_rank}. "
                "Save and load it to merge LoRA, then quantize."
            )
        kernel = jnp.asarray(self.float_weights["kernel"].value)
        if not jnp.all(jnp.isfinite(kernel)):
            raise ValueError(
                f"{self.name}/kernel holds NaN or Inf; got shape {kernel.shape}. Fix it, then "
                "quantize."
            )

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
            # The optimizer overwrites them with their gradients, which are their next values.
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
