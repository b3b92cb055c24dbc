"""The dtype policy of a layer; a setter that fails leaves it unchanged."""

from .. import compat


class PolicyMixin(compat.KerasLayer):
    """Comes before a Keras layer: its setter quantizes a built layer if the policy says so."""

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
