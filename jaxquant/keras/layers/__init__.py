"""Quantizable versions of Keras' layers, under the same names.

Paths in weight files depend on these names.
"""

from .attention import GroupQueryAttention as GroupQueryAttention
from .attention import MultiHeadAttention as MultiHeadAttention
from .convolution import Conv1D as Conv1D
from .convolution import Conv1DTranspose as Conv1DTranspose
from .convolution import Conv2D as Conv2D
from .convolution import Conv2DTranspose as Conv2DTranspose
from .convolution import Conv3D as Conv3D
from .convolution import Conv3DTranspose as Conv3DTranspose
from .convolution import DepthwiseConv1D as DepthwiseConv1D
from .convolution import DepthwiseConv2D as DepthwiseConv2D
from .convolution import SeparableConv1D as SeparableConv1D
from .convolution import SeparableConv2D as SeparableConv2D
from .core import Dense as Dense
from .core import EinsumDense as EinsumDense
from .core import Embedding as Embedding
from .core import ReversibleEmbedding as ReversibleEmbedding
from .recurrent import GRU as GRU
from .recurrent import LSTM as LSTM
from .recurrent import Bidirectional as Bidirectional
from .recurrent import GRUCell as GRUCell
from .recurrent import LSTMCell as LSTMCell
from .recurrent import SimpleRNN as SimpleRNN
from .recurrent import SimpleRNNCell as SimpleRNNCell
from .recurrent import TimeDistributed as TimeDistributed
