"""Names of `calibration` that other folders of this package use but that are not public."""

from .batches import check_arrays as check_arrays
from .collect import Collector as Collector
from .tap import PAIR as PAIR
from .tap import with_tap as with_tap
