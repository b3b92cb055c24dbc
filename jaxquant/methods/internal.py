"""Names of `methods` that other folders of this package use but that are not public."""

from .adjustable import AdjustableRounding as AdjustableRounding
from .adjustable import Adjustments as Adjustments
from .chain import Chain as Chain
from .chain import apply_chain as apply_chain
from .chain import as_chain as as_chain
from .chain import needed as needed
from .layout import stack_axes as stack_axes
from .method import Notes as Notes
from .method import is_transform as is_transform
from .statistics import STATISTICS as STATISTICS
