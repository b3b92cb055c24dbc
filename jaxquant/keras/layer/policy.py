"""The dtype policy of a layer, which a setter that fails leaves as it was."""

from .. import compat


class PolicyMixin(compat.KerasLayer):
    """Comes before a Keras layer, whose setter quantizes a built layer by a quantized policy."""

    @property
    def dtype_policy(self):
        """The dtype policy. Setting a quantized one on a built layer quantizes it."""
        return super().dtype_policy

    @dtype_policy.setter
    def dtype_policy(self, policy):
        before = self.dtype_policy
        setter = super(PolicyMixin, type(self)).dtype_policy.fset
        try:
            setter(self, policy)
        except BaseException:
            # Else the layer would have float variables under a quantized policy.
            if not compat.has_quantized_variables(self):
                setter(self, before)
            raise
