"""Files of quantized layers, also in the format of stock Keras."""

from .checksums import read_entries as read_entries
from .checksums import write_checksums as write_checksums
from .entries import ADAPTER as ADAPTER
from .entries import MARK as MARK
from .entries import check_holds_floats as check_holds_floats
from .entries import is_quantized as is_quantized
from .entries import load as load
from .entries import other_variables as other_variables
from .entries import restored_on_error as restored_on_error
from .entries import save as save
from .stock_entries import StockMatrix as StockMatrix
from .stock_entries import repeat_groups as repeat_groups
from .storage_arrays import from_storage_arrays as from_storage_arrays
from .storage_arrays import storage_types as storage_types
from .storage_arrays import to_storage_arrays as to_storage_arrays
