"""Bits where they count: a format for each parameter, under a budget of stored bits."""

from .allocate import allocate as allocate
from .allocation import Allocation as Allocation
from .allocation import AllocationRow as AllocationRow
from .losses import random_projection as random_projection
from .losses import sampled_token as sampled_token
from .sizes import dense_bits as dense_bits
from .sizes import stored_bits as stored_bits
