"""Pytrees of parameters: quantize them by rules, report the effect, save and load them."""

from ..core import describe as describe
from .files import load as load
from .files import read_metadata as read_metadata
from .files import save as save
from .fold import Fold as Fold
from .fold import FoldRotation as FoldRotation
from .fold import fold as fold
from .paths import is_quantized as is_quantized
from .progress import Progress as Progress
from .quantize import dequantize as dequantize
from .quantize import quantize as quantize
from .reorder import reorder as reorder
from .report import Report as Report
from .report import report as report
from .report_row import ReportRow as ReportRow
from .requantize import requantize as requantize
from .rules import Rule as Rule
from .rules import Rules as Rules
from .rules import default_rules as default_rules
from .verify import verify as verify
