"""Quantization inside training loops: pure functions and pytrees, for `jax.grad` and optax."""

from .blocks import Blockwise as Blockwise
from .fake_quantize import LearnedRange as LearnedRange
from .fake_quantize import LearnedStep as LearnedStep
from .fake_quantize import fake_quantize as fake_quantize
from .optimizer import STATE_4_BIT as STATE_4_BIT
from .optimizer import STATE_8_BIT as STATE_8_BIT
from .optimizer import QuantizedState as QuantizedState
from .optimizer import quantized_state as quantized_state
from .optimizer import state_bytes as state_bytes
from .prepare import Prepared as Prepared
from .prepare import convert as convert
from .prepare import init_learned as init_learned
from .prepare import prepare as prepare
from .psum import GRADIENT_8_BIT as GRADIENT_8_BIT
from .psum import quantized_psum as quantized_psum
