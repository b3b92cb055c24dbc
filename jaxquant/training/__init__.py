"""Quantization inside training loops: pure functions and pytrees, for `jax.grad` and optax."""

from ..core import LowRank as LowRank
from .calibrate import calibrate as calibrate
from .fake_quantize import LearnedRange as LearnedRange
from .fake_quantize import LearnedStep as LearnedStep
from .fake_quantize import fake_quantize as fake_quantize
from .lora import combine as combine
from .lora import lora_init as lora_init
from .lora import merge as merge
from .lora import partition as partition
from .lora import trainable_mask as trainable_mask
from .observers import MovingAverage as MovingAverage
from .observers import MSEHistogram as MSEHistogram
from .observers import Observer as Observer
from .observers import PercentileHistogram as PercentileHistogram
from .observers import RunningAbsMax as RunningAbsMax
from .prepare import Prepared as Prepared
from .prepare import convert as convert
from .prepare import init_learned as init_learned
from .prepare import prepare as prepare
