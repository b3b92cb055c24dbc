"""Whole pytrees of parameters: which leaves, how, with what effect, and in which file."""

from ..core import describe as describe
from .files import check_target as check_target
from .files import is_saved_tree as is_saved_tree
from .files import load as load
from .files import read_arrays as read_arrays
from .files import read_metadata as read_metadata
from .files import save as save
from .paths import leaves_with_paths as leaves_with_paths
from .quantize import Progress as Progress
from .quantize import dequantize as dequantize
from .quantize import objection as objection
from .quantize import quantize as quantize
from .quantize import quantize_leaf as quantize_leaf
from .quantize import reorder as reorder
from .quantize import reporter as reporter
from .quantize import select as select
from .quantize import stored_order as stored_order
from .report import Report as Report
from .report import ReportRow as ReportRow
from .report import report as report
from .rules import Rule as Rule
from .rules import Rules as Rules
from .rules import as_rules as as_rules
from .rules import default_rules as default_rules
from .rules import is_matrix as is_matrix
