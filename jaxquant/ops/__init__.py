"""Array operations that take arrays and QTensors, with the signatures of jnp and lax."""

from .conv import conv_general_dilated as conv_general_dilated
from .dot import dot_general as dot_general
from .einsum import einsum as einsum
from .einsum import matmul as matmul
from .explain import explain as explain
from .explanation import Explanation as Explanation
from .explanation import ExplanationRow as ExplanationRow
from .ragged import ragged_dot as ragged_dot
from .scan import scan as scan
from .sharding import vary_alike as vary_alike
from .sharding import varying_axes as varying_axes
from .storage import best_order as best_order
from .take import take as take
