"""Quantization of Keras models. Importing it makes our layers and configs loadable."""

from . import layers as layers
from .configs import Config as Config
from .configs import Float8QuantizationConfig as Float8QuantizationConfig
from .configs import Int4QuantizationConfig as Int4QuantizationConfig
from .configs import Int8QuantizationConfig as Int8QuantizationConfig
from .convert import convert as convert
from .convert import to_stock as to_stock
from .functional import functional as functional
from .mixin import QuantizableMixin as QuantizableMixin
from .models import quantize as quantize
from .quantizers import AbsMaxQuantizer as AbsMaxQuantizer
from .quantizers import PercentileQuantizer as PercentileQuantizer
from .quantizers import Quantizer as Quantizer
from .weights import QuantizedWeight as QuantizedWeight
