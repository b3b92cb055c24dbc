"""Quantization of Keras models. Importing it registers its layers and configs for loading."""

from . import layers as layers
from .configs import Float8QuantizationConfig as Float8QuantizationConfig
from .configs import Int4QuantizationConfig as Int4QuantizationConfig
from .configs import Int8QuantizationConfig as Int8QuantizationConfig
from .configs import QuantizationConfig as QuantizationConfig
from .layer import QuantizableMixin as QuantizableMixin
from .layer import QuantizedWeight as QuantizedWeight
from .models import convert as convert
from .models import functional as functional
from .models import load_preset as load_preset
from .models import load_weights as load_weights
from .models import quantize as quantize
from .models import to_stock as to_stock
from .quantizers import AbsMaxQuantizer as AbsMaxQuantizer
from .quantizers import PercentileQuantizer as PercentileQuantizer
from .quantizers import Quantizer as Quantizer
