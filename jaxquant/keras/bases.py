"""Keras' classes that those of this package derive from, with types.

Keras does not declare types, and type checkers know nothing about a class with a base of unknown
type. They read the classes under TYPE_CHECKING instead, which declare what is used here.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

import keras

if TYPE_CHECKING:

    class KerasLayer:
        """The Keras layer that follows a mixin among the bases."""

        add_weight: Any
        call: Any
        dtype_policy: Any
        from_config: Any
        get_config: Any
        load_own_variables: Any
        quantization_mode: Any
        save_own_variables: Any

        def __new__(cls, *args: Any, **kwargs: Any) -> Any: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    class KerasQuantizationConfig:
        """A config that says how a layer is quantized."""

        from_config: Any
        get_config: Any
        mode: Any

    class KerasQuantizer:
        """A function from floating-point values to codes and a scale."""

        def __init__(self, output_dtype: str = "int8"):
            self.output_dtype = output_dtype

    class KerasVariable:
        """An array that can be assigned to."""

        name: str

else:
    KerasQuantizationConfig = keras.quantizers.QuantizationConfig
    KerasQuantizer = keras.quantizers.Quantizer
    KerasVariable = keras.Variable

    class KerasLayer:
        """A mixin gets its attributes from the Keras layer that follows among the bases."""


# What the functions about layers accept: also a mixin, whose bases do not include a layer.
AnyLayer: TypeAlias = keras.layers.Layer | KerasLayer
