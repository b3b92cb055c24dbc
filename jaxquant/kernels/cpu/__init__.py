"""Native kernels for CPUs, called through XLA's FFI."""

from .handlers import InStack as InStack
from .handlers import attend as attend
from .handlers import grouped_dot as grouped_dot
from .handlers import int8_dot as int8_dot
from .handlers import lookup_dot as lookup_dot
from .handlers import quantize_rows as quantize_rows
from .handlers import ragged_dot as ragged_dot
from .handlers import scaled_int8_dot as scaled_int8_dot
from .handlers import take_slice as take_slice
from .handlers import why_unsupported_groups as why_unsupported_groups
from .handlers import widen_dot as widen_dot
from .library import instruction_sets as instruction_sets
from .library import unavailable as unavailable
from .updates import OPERATIONS as OPERATIONS
from .updates import update_blocks as update_blocks
from .updates import why_unsupported_blocks as why_unsupported_blocks
