"""Quantized layers in Keras files, and as stock Keras writes them."""

from .entries import MARK as MARK
from .entries import other_variables as other_variables
from .saving import SavedMixin as SavedMixin
from .stock_entries import StockMatrix as StockMatrix
from .stock_entries import spread as spread
from .storage_arrays import carriers as carriers
from .storage_arrays import from_carriers as from_carriers
from .storage_arrays import to_carriers as to_carriers
