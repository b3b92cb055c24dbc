"""Everything that reads JAX's internals, and nothing else."""

from . import chips as chips
from .chips import by_generation as by_generation
from .chips import tpu_generation as tpu_generation
from .lowering import Function as Function
from .lowering import is_for_one_cpu as is_for_one_cpu
from .lowering import on_one_cpu as on_one_cpu
from .lowering import on_one_gpu as on_one_gpu
from .lowering import on_one_tpu as on_one_tpu
from .lowering import transpose_of as transpose_of
from .lowering import unless_exported as unless_exported
from .markers import mark as mark
from .markers import marker_p as marker_p
from .markers import marking as marking
from .sharding import OutSharding as OutSharding
from .sharding import before_transpose as before_transpose
from .sharding import is_sharded as is_sharded
from .sharding import like_result as like_result
from .sharding import vary_alike as vary_alike
from .sharding import varying_axes as varying_axes
from .slices import count_before_slices as count_before_slices
from .slices import is_narrow as is_narrow
from .slices import is_sliced as is_sliced
from .slices import sliced_by as sliced_by
from .slices import sliced_within as sliced_within
