"""Names of `tree` that other folders of this package use but that are not public."""

from .atomic import replacing as replacing
from .files import check_target as check_target
from .files import read_arrays as read_arrays
from .files import read_tree as read_tree
from .paths import leaves_with_paths as leaves_with_paths
from .progress import progress_bar as progress_bar
from .quantize import quantize_leaf as quantize_leaf
from .quantize import select as select
from .quantize import stored_order as stored_order
from .quantize import why_unsupported as why_unsupported
from .report_table import to_text as to_text
from .rules import Plan as Plan
from .rules import as_rules as as_rules
from .rules import is_matrix as is_matrix
from .rules import match_rules as match_rules
from .rules import unused_rules as unused_rules
from .tensor_file import DTYPES as DTYPES
from .tensor_file import MALFORMED as MALFORMED
from .tensor_file import MAX_HEADER_BYTES as MAX_HEADER_BYTES
from .tensor_file import Entry as Entry
from .tensor_file import check_regular as check_regular
from .tensor_file import open_tensors as open_tensors
from .tensor_file import summary as summary
from .tensor_file import write_tensors as write_tensors
