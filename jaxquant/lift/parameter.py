"""Quantized values inside of a lifted function."""

import dataclasses
from typing import Any

import jax

from ..core import LowRank, QTensor, TrainedArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Tagged:
    """A float array that rules recognize, with what they need to know about it. A pytree.

    Attributes:
        array: the array.
        extra: other arrays, such as a state; any pytree.
        tag: anything hashable, static.
    """

    array: jax.Array
    extra: Any = None
    tag: Any = dataclasses.field(default=None, kw_only=True, metadata={"static": True})

    def with_array(self, array: Any) -> "Tagged":
        """The same with another array."""
        return dataclasses.replace(self, array=array)


Quantized = QTensor | TrainedArray | LowRank | Tagged


class Unsupported(Exception):
    """Says why an operation has no form for quantized operands, which are then dequantized."""


@dataclasses.dataclass(eq=False)
class Parameter:
    """A quantized argument, or part of one, while a function is evaluated.

    Attributes:
        value: what stands for the array.
        path: of the argument, as rules name it.
        is_whole: whether it is the argument itself, not a part or another form of it.
        is_row: whether it is one row of a table, which is dequantized as rows that `take` selects.
    """

    value: Any
    path: str
    is_whole: bool = False
    is_row: bool = False
    _forms: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def qtensor(self) -> QTensor:
        """The QTensor that the value is, or is in this step of training.

        Raises:
            Unsupported: it has adapters.
        """
        if isinstance(self.value, LowRank):
            raise Unsupported("adapters cannot follow it; merge them first")
        if isinstance(self.value, QTensor):
            return self.value
        if "quantized" not in self._forms:
            self._forms["quantized"] = self.value.quantize()
        return self._forms["quantized"]

    def dequantize(self) -> jax.Array:
        """The array that the value stands for.

        Raises:
            ValueError: as for `unchanged`.
        """
        value = self.unchanged()
        if "dequantized" not in self._forms:
            self._forms["dequantized"] = value.dequantize()
        return self._forms["dequantized"]

    def unchanged(self) -> QTensor | LowRank:
        """The value, for an operation that does not apply `inputs`.

        Raises:
            ValueError: its activations are multiplied, permuted or rotated, without which it
                stands for another array.
        """
        value = self.value if isinstance(self.value, LowRank) else self.qtensor()
        inputs = value.base.inputs if isinstance(value, LowRank) else value.inputs
        name = None if inputs is None else inputs.changing_field
        if name is not None:
            raise ValueError(
                f"{self.path} can only be an operand of a product, because inputs.{name} changes "
                "the activations that it is multiplied with; got an operation that dequantizes, "
                f"changes or indexes it. Quantize it without a {name}."
            )
        return value

    def derive(self, value: Quantized) -> "Parameter":
        """Another form of the same argument."""
        return Parameter(value, self.path, is_row=self.is_row)
