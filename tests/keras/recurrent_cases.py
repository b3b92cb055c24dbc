"""Rows of the table-driven test: recurrent layers and reversible embeddings."""

import jax
import keras

from jaxquant.keras import layers

from .layer_cases import LayerCase, tokens

SEQUENCE = (5, 40)
BIASED = {"bias_initializer": "normal"}


def products(jaxpr):
    """Dtypes (left, right, result) of the products in a program and the functions it calls."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found |= {tuple(x.aval.dtype.name for x in (*equation.invars, *equation.outvars))}
        for inner in jax.tree.leaves(list(equation.params.values())):
            found |= products(inner) if hasattr(inner, "eqns") else set()
    return found


def there_and_back(**arguments):
    """Looks tokens up in a table, and projects back to logits."""

    def build(**kw):
        inputs = keras.Input((6,), dtype="int32")
        table = layers.ReversibleEmbedding(40, 150, **arguments, **kw)
        return keras.Model(inputs, table(table(inputs), reverse=True))

    return build


RECURRENT = [
    LayerCase("SimpleRNN", lambda **kw: layers.SimpleRNN(24, **BIASED, **kw), SEQUENCE),
    LayerCase("LSTM", lambda **kw: layers.LSTM(24, **BIASED, **kw), SEQUENCE),
    LayerCase("GRU", lambda **kw: layers.GRU(24, **BIASED, **kw), SEQUENCE),
    LayerCase(
        "GRU reset before",
        lambda **kw: layers.GRU(24, reset_after=False, **BIASED, **kw),
        SEQUENCE,
    ),
    LayerCase(
        "Bidirectional",
        lambda **kw: layers.Bidirectional(layers.LSTM(24, **BIASED, **kw), **kw),
        SEQUENCE,
    ),
    LayerCase(
        "TimeDistributed",
        lambda **kw: layers.TimeDistributed(layers.Dense(24, **BIASED, **kw), **kw),
        SEQUENCE,
    ),
    LayerCase("ReversibleEmbedding", there_and_back(logit_soft_cap=2.0), (6,), tokens),
    LayerCase("ReversibleEmbedding untied", there_and_back(tie_weights=False), (6,), tokens),
]
