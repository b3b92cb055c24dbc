"""Which computation runs for each quantized operation of a function, and why."""

from .explain import explain as explain
from .machines import machine_for as machine_for
from .table import DequantizedRow as DequantizedRow
from .table import Explanation as Explanation
from .table import ExplanationRow as ExplanationRow
