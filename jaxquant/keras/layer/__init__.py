"""Mixins that make a Keras layer quantizable."""

from .float8 import Float8TrainingMixin as Float8TrainingMixin
from .kernel_layer import CHANNEL_AXIS as CHANNEL_AXIS
from .kernel_layer import KernelLayerMixin as KernelLayerMixin
from .lora import LoraMixin as LoraMixin
from .mixin import QuantizableMixin as QuantizableMixin
from .policy import PolicyMixin as PolicyMixin
from .recast import recast as recast
from .weights import QuantizedWeight as QuantizedWeight
from .weights import StoredWeight as StoredWeight
from .weights import of_layer as of_layer
from .weights import replaced as replaced
from .wrappers import MODES_WITH_DATA as MODES_WITH_DATA
