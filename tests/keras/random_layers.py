"""Random configurations of stock Keras layers, one strategy for each kind of layer."""

from typing import Any, NamedTuple

import hypothesis.strategies as st
import keras

from jaxquant import INT4, INT8, NF4A16, NVFP4A16, W4A8, W8A16, ArrayConfig, MinMSE, Percentile
from jaxquant.keras import Int4QuantizationConfig


class Drawn(NamedTuple):
    """A layer to be made, and the shape of its input.

    Attributes:
        layer: class of the layer, or a function that returns one.
        arguments: its arguments; inner layers are Drawn too, or lists of these.
        shape: of one example, without the batch.
        tokens: the number of different tokens, if the inputs are tokens.
        dtype: the only policy that stock Keras runs it in; empty for any.
    """

    layer: Any
    arguments: dict[str, Any]
    shape: tuple[int, ...]
    tokens: int = 0
    dtype: str = ""

    def make(self, dtype: str) -> Any:
        """The layer, with random biases, under a dtype policy."""
        dtype = self.dtype or dtype
        arguments = {k: _with_layers(x, dtype) for k, x in self.arguments.items()}
        return self.layer(**arguments, dtype=dtype)


def _with_layers(argument, dtype):
    if isinstance(argument, list):
        return [_with_layers(x, dtype) for x in argument]
    return argument.make(dtype) if isinstance(argument, Drawn) else argument


SMALL, WIDTH, FLAG = st.integers(1, 5), st.integers(1, 40), st.booleans()
ACTIVATION = st.sampled_from([None, "relu", "gelu", "tanh"])
BIASED = {"use_bias": FLAG, "bias_initializer": st.just("normal")}
PENALIZED = {
    "kernel_regularizer": st.sampled_from([None, "l2"]),
    "kernel_constraint": st.sampled_from([None, "max_norm"]),
}
FORMATS = st.sampled_from(["channels_last", "channels_first"])


def options(**strategies):
    return st.fixed_dictionaries(strategies)


def some_axes(least, most, sizes=SMALL):
    return st.lists(sizes, min_size=least, max_size=most).map(tuple)


@st.composite
def dense(draw):
    arguments = options(units=WIDTH, activation=ACTIVATION, **BIASED, **PENALIZED)
    return Drawn(keras.layers.Dense, draw(arguments), (*draw(some_axes(0, 2)), draw(WIDTH)))


@st.composite
def einsum_dense(draw):
    """An equation of batch axes, contracted ones and new ones, each in a random order."""
    shape, new = draw(some_axes(1, 3)), draw(some_axes(1, 2))
    inputs, made = "bcd"[: len(shape)], "xy"[: len(new)]
    contracted = draw(st.sets(st.sampled_from(inputs), min_size=1))
    shared = draw(st.sets(st.sampled_from(inputs))) - contracted
    kernel = "".join(draw(st.permutations([*contracted, *shared, *made])))
    kept = [c for c in inputs if c not in contracted]
    output = "".join(draw(st.permutations([*kept, *made])))
    sizes = dict(zip(inputs + made, (*shape, *new), strict=True))
    biases = draw(st.sets(st.sampled_from(output)))
    arguments = {
        "equation": f"a{inputs},{kernel}->a{output}",
        "output_shape": tuple(sizes[c] for c in output),
        "bias_axes": "".join(c for c in output if c in biases) or None,
        "activation": draw(ACTIVATION),
        "bias_initializer": "normal",
    }
    return Drawn(keras.layers.EinsumDense, arguments, shape)


@st.composite
def embedding(draw):
    count, width = draw(WIDTH), draw(WIDTH)
    arguments = {"input_dim": count, "output_dim": width, "mask_zero": draw(FLAG)}
    return Drawn(keras.layers.Embedding, arguments, draw(some_axes(0, 2)), count)


def there_and_back(**arguments):
    """Looks tokens up in a table, and projects back to logits."""
    table = keras.layers.ReversibleEmbedding(**arguments)
    return lambda inputs: table(table(inputs), reverse=True)


@st.composite
def reversible_embedding(draw):
    count = draw(WIDTH)
    cap = st.sampled_from([None, 2.0])
    arguments = draw(options(output_dim=WIDTH, tie_weights=FLAG, logit_soft_cap=cap))
    return Drawn(there_and_back, {"input_dim": count, **arguments}, draw(some_axes(1, 1)), count)


def images(rank, data_format, channels, sizes):
    is_last = data_format == "channels_last"
    return (*sizes[:rank], channels) if is_last else (channels, *sizes[:rank])


SIZES = st.lists(st.integers(6, 9), min_size=3, max_size=3)


@st.composite
def convolution(draw, name, rank, is_depthwise=False, paddings=("valid", "same")):
    """A convolution with strides or dilation, and groups if the class has them."""
    data_format = draw(FORMATS)
    kernel = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank).map(tuple))
    stride, dilation = draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    groups = draw(st.sampled_from([1, 1, 2])) if name in ("Conv1D", "Conv2D", "Conv3D") else 1
    channels, filters = groups * draw(SMALL), groups * draw(SMALL)
    arguments: dict[str, Any] = {
        "kernel_size": kernel,
        "strides": stride,
        "dilation_rate": dilation,
        "padding": draw(st.sampled_from(paddings)),
        "data_format": data_format,
        "activation": draw(ACTIVATION),
        "use_bias": draw(FLAG),
        "bias_initializer": "normal",
    }
    arguments |= {} if is_depthwise else {"filters": filters}
    arguments |= {"groups": groups} if groups > 1 else {}
    if is_depthwise or name.startswith("Separable"):
        arguments["depth_multiplier"] = draw(st.integers(1, 2))
    shape = images(rank, data_format, channels, draw(SIZES))
    return Drawn(getattr(keras.layers, name), arguments, shape)


CONVOLUTIONS = {
    "Conv1D": convolution("Conv1D", 1, paddings=("valid", "same", "causal")),
    "Conv2D": convolution("Conv2D", 2),
    "Conv3D": convolution("Conv3D", 3),
    "Conv1DTranspose": convolution("Conv1DTranspose", 1),
    "Conv2DTranspose": convolution("Conv2DTranspose", 2),
    "Conv3DTranspose": convolution("Conv3DTranspose", 3),
    "DepthwiseConv1D": convolution("DepthwiseConv1D", 1, is_depthwise=True),
    "DepthwiseConv2D": convolution("DepthwiseConv2D", 2, is_depthwise=True),
    "SeparableConv1D": convolution("SeparableConv1D", 1),
    "SeparableConv2D": convolution("SeparableConv2D", 2),
}


# An initializer that Keras has in bfloat16 too, where a GRU cannot run without a bias.
GATED = {"recurrent_initializer": st.just("glorot_uniform"), **BIASED}


def gates(layer):
    name = layer.__name__
    return {**GATED, "use_bias": st.just(True)} if name.startswith("GRU") else GATED


@st.composite
def recurrent(draw, layer):
    """The layer, or two of it in both directions."""
    arguments = draw(
        options(
            units=SMALL,
            go_backwards=FLAG,
            return_sequences=FLAG,
            dropout=st.sampled_from([0.0, 0.5]),
            **gates(layer),
        )
    )
    arguments |= {"reset_after": draw(FLAG)} if layer is keras.layers.GRU else {}
    drawn = Drawn(layer, arguments, (draw(SMALL), draw(WIDTH)))
    merge = draw(st.sampled_from([None, "concat", "sum"]))
    if merge is None:
        return drawn
    drawn = drawn._replace(arguments={**arguments, "go_backwards": False})
    both = {"layer": drawn, "merge_mode": merge}
    return Drawn(keras.layers.Bidirectional, both, drawn.shape)


CELLS = [keras.layers.SimpleRNNCell, keras.layers.LSTMCell, keras.layers.GRUCell]


@st.composite
def stacked(draw):
    kinds = draw(st.lists(st.sampled_from(CELLS), min_size=2, max_size=3))
    shape = draw(SMALL), draw(WIDTH)
    cells = [Drawn(kind, draw(options(units=SMALL, **gates(kind))), shape) for kind in kinds]
    arguments = {"cell": cells, "return_sequences": draw(FLAG)}
    return Drawn(keras.layers.RNN, arguments, shape, dtype="float32")


@st.composite
def distributed(draw):
    inner = draw(st.one_of(dense(), convolution("Conv2D", 2)))
    return Drawn(keras.layers.TimeDistributed, {"layer": inner}, (draw(SMALL), *inner.shape))


@st.composite
def attention(draw, is_grouped):
    heads, width = draw(st.integers(1, 3)), draw(WIDTH)
    if not is_grouped:
        # On JAX, stock Keras does not run with a value_dim that differs from key_dim.
        arguments = draw(options(key_dim=SMALL, use_bias=FLAG))
        return Drawn(
            keras.layers.MultiHeadAttention,
            {"num_heads": heads, **arguments},
            (draw(SMALL), width),
        )
    arguments = {"num_query_heads": 2 * heads, "num_key_value_heads": heads}
    arguments |= draw(options(head_dim=SMALL, use_bias=FLAG))
    return Drawn(keras.layers.GroupQueryAttention, arguments, (draw(SMALL), width))


KINDS: dict[str, Any] = {
    "Dense": dense(),
    "EinsumDense": einsum_dense(),
    "Embedding": embedding(),
    "ReversibleEmbedding": reversible_embedding(),
    "SimpleRNN": recurrent(keras.layers.SimpleRNN),
    "LSTM": recurrent(keras.layers.LSTM),
    "GRU": recurrent(keras.layers.GRU),
    "RNN of cells": stacked(),
    "TimeDistributed": distributed(),
    "MultiHeadAttention": attention(is_grouped=False),
    "GroupQueryAttention": attention(is_grouped=True),
    **CONVOLUTIONS,
}
POLICIES = ["float32", "bfloat16", "mixed_bfloat16"]
SCHEMES: list[Any] = [
    "int8",
    "int4",
    "float8",
    W8A16,
    W4A8,
    NF4A16,
    NVFP4A16,
    Int4QuantizationConfig(block_size=3),
    ArrayConfig(format=INT8, per_tensor=True, range=Percentile(99)),
    ArrayConfig(format=INT4, group_size=4, range=MinMSE()),
]
