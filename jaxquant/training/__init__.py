"""Quantization inside training loops: pure functions and pytrees, for `jax.grad` and optax."""

from .calibrate import calibrate as calibrate
from .delayed import DelayedScaling as DelayedScaling
from .delayed import amax_of as amax_of
from .delayed import push_amax as push_amax
from .delayed import skip_scaling as skip_scaling
from .delayed import update_scaling as update_scaling
from .dot import dot_general as dot_general
from .dot import matmul as matmul
from .fake_quantize import LearnedRange as LearnedRange
from .fake_quantize import LearnedStep as LearnedStep
from .fake_quantize import fake_quantize as fake_quantize
from .observers import MovingAverage as MovingAverage
from .observers import MSEHistogram as MSEHistogram
from .observers import Observer as Observer
from .observers import PercentileHistogram as PercentileHistogram
from .observers import RunningAbsMax as RunningAbsMax
from .prepare import Prepared as Prepared
from .prepare import convert as convert
from .prepare import init_learned as init_learned
from .prepare import prepare as prepare
from .product import FP8_TRAINING as FP8_TRAINING
from .product import INT8_TRAINING as INT8_TRAINING
from .product import SWITCHBACK as SWITCHBACK
from .product import ProductConfig as ProductConfig
