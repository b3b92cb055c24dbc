"""The dtype policy of a layer. If setting it fails, it is unchanged."""

from .. import compat


class PolicyMixin(compat.KerasLayer):
    """Comes before the Keras layer among the bases. A quantized policy quantizes a built layer."""

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
            # Float variables do not fit a quantized policy.
            if not compat.has_quantized_variables(self):
                setter(self, before)
            raise
