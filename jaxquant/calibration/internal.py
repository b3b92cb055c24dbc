"""Names of `calibration` that other folders of this package use but that are not public."""

from .collect import PAIR as PAIR
from .collect import Collector as Collector
