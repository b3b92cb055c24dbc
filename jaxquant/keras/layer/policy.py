"""The dtype policy of a layer. If setting it fails, it is unchanged."""

from typing import Any

from .. import compat


def check_compute_dtype(layer: Any, mode: str) -> None:
    """Checks that Keras has a policy of this mode for the layer's dtype: none for int8 in float16.

    Raises:
        ValueError: it does not. Keras raises one too, which recommends mixed_float16.
    """
    if (mode, layer.compute_dtype) in _WITHOUT_POLICY:
        raise ValueError(
            f"{layer.name} must compute in float32 or bfloat16 to be quantized to {mode}; got "
            f"dtype_policy={layer.dtype_policy.name!r}, which computes in float16. Load the model "
            "with dtype='mixed_bfloat16', 'bfloat16' or 'float32', or quantize to int4 or float8."
        )


# Modes and dtypes that Keras has no policy for.
_WITHOUT_POLICY = {("int8", "float16")}


class PolicyMixin(compat.StoresItsWeights):
    """Comes before the Keras layer among the bases. A quantized policy quantizes a built layer."""

    @property
    def dtype_policy(self) -> Any:
        """The dtype policy. Setting a quantized one on a built layer quantizes it."""
        return super().dtype_policy

    @dtype_policy.setter
    def dtype_policy(self, policy: Any) -> None:
        before = self.dtype_policy
        setter = super(PolicyMixin, type(self)).dtype_policy.fset
        try:
            setter(self, policy)
        except BaseException:
            # Float variables do not fit a quantized policy.
            if not compat.has_quantized_variables(self):
                setter(self, before)
            raise
