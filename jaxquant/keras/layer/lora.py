"""Low-rank adapters (LoRA) on float and quantized weights.

    weight + (alpha / rank) * a @ b

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from ...core import LowRank, QTensor, add_low_rank, low_rank_product, low_rank_shapes
from .. import files
from .mixin import QuantizableMixin


class LoraMixin(QuantizableMixin):
    """Adds `enable_lora` for the layer's first declared weight."""

    lora_enabled = False

    def enable_lora(
        self,
        rank: int,
        lora_alpha: float | None = None,
        a_initializer: Any = "he_uniform",
        b_initializer: Any = "zeros",
    ) -> None:
        """Freezes the weight and adds trainable `a` (..., rank) and `b` (rank, n) to it.

        Files of a quantized layer hold its codes and the adapter, so that a loaded layer computes
        the same bit for bit. Files of a float layer hold the merged weight, as those of Keras do.

        Args:
            rank: length of the axis between `a` and `b`.
            lora_alpha: alpha; None for the rank, which makes the factor 1.
            a_initializer: a Keras initializer.
            b_initializer: one for `b`; zeros keep the weight unchanged until `b` is trained.

        Raises:
            ValueError: the layer is not built, already has LoRA, has a constraint on the weight, or
                trains in float8; or the rank is not positive. The layer is unchanged.
        """
        name = next(iter(self.declared_weights))
        self._check_lora(name, rank)
        shapes = low_rank_shapes(tuple(getattr(self, name).shape), rank)
        initializers = (a_initializer, b_initializer)
        with self.weight_state.all_or_nothing():
            # float32 under every policy: small updates must not underflow.
            options = {"dtype": "float32", "regularizer": self._lora_regularizer(name)}
            for part, shape, initializer in zip("ab", shapes, initializers, strict=True):
                variable = f"lora_{name}_{part}"
                created = self.add_weight(
                    name=variable, shape=shape, initializer=initializer, **options
                )
                setattr(self, variable, created)
        if name in self.float_weights:
            self.float_weights[name].trainable = False
        self.lora_enabled: bool = True
        self.lora_rank = rank
        self.lora_alpha: float = rank if lora_alpha is None else lora_alpha
        self.renew_optimizers()

    def lora_operand(self, name: str) -> LowRank | QTensor | jax.Array:
        """`operand(name)` of a quantized weight, as a `LowRank` if it has an adapter."""
        base = self.operand(name)
        if not self._has_lora(name):
            return base
        a, b = self._lora_factors(name)
        plan = self.weight_state.plan(name, self.quantization_config)
        assert isinstance(base, QTensor), "called without codes"
        assert plan is not None, "called without codes"
        return LowRank(base, a, b, alpha=self.lora_alpha, config=plan[1].weights)

    def lora_delta(self, name: str) -> jax.Array:
        """(alpha / rank) * a @ b, in the dtype of the running layer."""
        return low_rank_product(*self._lora_factors(name), self.lora_alpha)

    def adapted(self, name: str, value: Any) -> Any:
        """The weight with its adapter added."""
        if not self._has_lora(name):
            return value
        total = add_low_rank(jnp.asarray(value), *self._lora_factors(name), self.lora_alpha)
        return keras.ops.cast(total, self.compute_dtype)

    def tensor_to_save(self, name: str) -> QTensor:
        """The weight with its adapter merged, quantized again with the same config: for Keras."""
        if not self._has_lora(name):
            return super().tensor_to_save(name)
        values = self.stored_weights[name].dequantize()
        total = add_low_rank(values, *self._lora_factors(name), self.lora_alpha)
        return self.quantized_values(name, total, self.quantization_config)

    def save_own_variables(self, store: Any) -> None:
        """As `QuantizableMixin` does, then the adapter if the weight is quantized."""
        super().save_own_variables(store)
        name = next(iter(self.declared_weights), "")
        if self.lora_enabled and name in self.stored_weights:
            a, b = (getattr(self, f"lora_{name}_{part}") for part in "ab")
            parts = a, b, np.float32(self.lora_alpha)
            for key, value in zip(files.ADAPTER, parts, strict=True):
                store[key] = keras.ops.convert_to_numpy(value)
            files.write_checksums(store)

    def load_own_variables(self, store: Any) -> None:
        """Reads the weights, and the adapter that is beside them; without one, clears the layer's.

        Raises:
            ValueError: as for `QuantizableMixin`; or the layer has LoRA of another rank than the
                file. The layer is unchanged.
        """
        name = next(iter(self.declared_weights), "")
        adapter = [np.asarray(store[key]) for key in files.ADAPTER if key in set(store.keys())]
        rank = adapter[0].shape[-1] if adapter else 0
        if adapter and self.lora_enabled and rank != self.lora_rank:
            raise ValueError(
                f"The file's adapter of layer {self.name!r} has rank {rank}; got a layer with LoRA "
                f"of rank {self.lora_rank}. Load it into a layer without LoRA, or of that rank."
            )
        super().load_own_variables(store)
        if adapter and not self.lora_enabled:
            self.enable_lora(rank, float(adapter[2]))
        if adapter:
            self.lora_alpha = float(adapter[2])
        if self.lora_enabled:
            a, b = (getattr(self, f"lora_{name}_{part}") for part in "ab")
            # Only `b` is cleared: if both were zero, neither would get a gradient.
            values = adapter[:2] if adapter else [a, keras.ops.zeros(b.shape)]
            a.assign(values[0])
            b.assign(values[1])

    def _lora_factors(self, name: str) -> tuple[jax.Array, jax.Array]:
        """`a` and `b`, in the dtype of the running layer."""
        a, b = (jnp.asarray(getattr(self, f"lora_{name}_{part}")) for part in "ab")
        return a, b

    def _has_lora(self, name: str) -> bool:
        return self.lora_enabled and name == next(iter(self.declared_weights))

    def _has_multiplier(self, name: str) -> bool:
        stored = self.stored_weights.get(name)
        inputs = None if stored is None else stored.like.inputs
        return inputs is not None and inputs.multiplier is not None

    def _lora_regularizer(self, name: str) -> Any:
        return getattr(self, f"{name}_regularizer", None)

    def _check_lora(self, name: str, rank: int) -> None:
        constraint, kind = getattr(self, f"{name}_constraint", None), name.removesuffix("s")
        problems = [
            (not (isinstance(rank, int) and rank > 0), "rank must be a positive int"),
            # Users match the words of Keras.
            (constraint is not None, f"Lora is incompatible with {kind} constraints; remove them"),
            (not self.built, "Cannot enable lora on a layer that isn't yet built; build it first"),
            (self.lora_enabled, "lora is already enabled. This can only be done once per layer"),
            (self._has_multiplier(name), "its activations have a multiplier, which a method chose"),
            (self.trains_in_float8, "the layer trains in float8; add LoRA before or after that"),
        ]
        found = [text for is_so, text in problems if is_so]
        if found:
            raise ValueError(f"Cannot run enable_lora({rank!r}) on {self.name!r}: {found[0]}.")
