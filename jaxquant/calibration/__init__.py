"""Observers and statistics of a single operand, such as the activations of one layer."""

from .histograms import MSEHistogram as MSEHistogram
from .histograms import PercentileHistogram as PercentileHistogram
from .observers import MovingAverage as MovingAverage
from .observers import Observer as Observer
from .observers import RunningAbsMax as RunningAbsMax
