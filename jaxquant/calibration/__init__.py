"""Observers and statistics of the activations that parameters are multiplied with."""

from .collect import collect as collect
from .collected import Statistics as Statistics
from .histograms import MSEHistogram as MSEHistogram
from .histograms import PercentileHistogram as PercentileHistogram
from .observers import MovingAverage as MovingAverage
from .observers import Observer as Observer
from .observers import RunningAbsMax as RunningAbsMax
