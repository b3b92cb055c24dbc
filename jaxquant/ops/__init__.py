"""Operations on arrays and QTensors, with the signatures of jnp and lax."""

from . import kv as kv
from .conv import conv_general_dilated as conv_general_dilated
from .dot import dot_general as dot_general
from .dot import matmul as matmul
from .einsum import einsum as einsum
from .inputs import Activations as Activations
from .ragged import ragged_dot as ragged_dot
from .record import Choice as Choice
from .record import Convolution as Convolution
from .record import Dequantization as Dequantization
from .record import Record as Record
from .record import bytes_of as bytes_of
from .record import operations_of as operations_of
from .scan import scan as scan
from .storage import best_order as best_order
from .take import take as take
