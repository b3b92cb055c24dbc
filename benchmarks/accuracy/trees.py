"""Quantizes the language model as a row says."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

import jaxquant as jq
from jaxquant import demo
from jaxquant.methods import MaxAbs, MeanAbs, SecondMoment

from . import language, rows

# Layers that share an option of `allocate`: each stack is compiled by itself.
_STACK = 3
# Batches that `allocate` measures; one of 8 windows takes as long as a step of training.
_MEASURED = 2
_RATE = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Trees:
    """Quantized models, each of which is computed once.

    Attributes:
        model: the float model.
        batches: of tokens, to calibrate on.
        epochs: of training of rows that are tuned.
    """

    model: language.LanguageModel
    batches: Sequence[Any]
    epochs: int = 2

    @cached_property
    def statistics(self) -> Any:
        """Those that all methods need, of the whole model."""
        wanted = [SecondMoment, MeanAbs, MaxAbs]
        layers = language.rules(jq.ArrayConfig())[1:]
        left = jq.Rule("embedding", None)
        return jq.collect(
            self._apply, self.model.params, self.batches, [left, *layers], wanted, progress=True
        )

    @cached_property
    def with_head(self) -> Any:
        """The parameters with the embedding, which is also the head, in 8 bits, as in all rows."""
        return jq.tree.quantize(self.model.params, language.rules(jq.W8A16)[:1])

    @cache  # noqa: B019 (as long-lived as the program)
    def quantized(self, bits: str, name: str) -> Any:
        """The model in a row's format."""
        row = rows.ROWS[name]
        scheme = row.scheme(bits)
        if row.tunes:
            return self._tuned(self.quantized(bits, row.tunes))
        if row.is_allocated:
            return self._allocated(bits, row)
        if row.is_sequential:
            return self._layer_by_layer(scheme, row)
        return self._at_once(self.with_head, language.rules(scheme)[1:], row, self.statistics)

    def _at_once(self, params: Any, layers: list[jq.Rule], row: rows.Row, statistics: Any) -> Any:
        rules = [jq.Rule("embedding", None), *layers]
        method = row.method or jq.methods.Nearest()
        tree = jq.tree.quantize(params, rules, method=method, statistics=statistics)
        return jax.block_until_ready(tree)

    def _layer_by_layer(self, scheme: jq.Scheme, row: rows.Row) -> Any:
        """The model whose layers are quantized with the activations of those quantized before."""
        params, config = self.model.params, self.model.config

        def block(weights: Any, x: jax.Array) -> jax.Array:
            return demo.decoder_layer(weights, config, params["frequencies"], x)

        layers = jq.tuning.sequential(
            block,
            params["layers"][0],
            [jq.take(params["embedding"], tokens, axis=0) for tokens in self.batches],
            [jq.Rule("*/kernel", scheme, axis=-1)],
            method=row.method,
            iterations=row.iterations,
            progress=True,
        )
        return {**self.with_head, "layers": (layers,)}

    def _tuned(self, tree: Any) -> Any:
        """The model after its scales were trained on the same batches."""
        import optax  # Only these rows need it.

        halves = [half for batch in self.batches for half in jnp.array_split(batch, 2)]
        return jq.tuning.distill(
            self._apply,
            self.model.params,
            tree,
            halves,
            optax.adam(_RATE),
            epochs=self.epochs,
            progress=True,
        )

    def _allocated(self, bits: str, row: rows.Row) -> Any:
        """The model whose stacks of layers differ in bits."""
        parts = {**self.with_head, "layers": _stacks(self.model.params["layers"][0])}
        rules = list(self._allocation(bits).rules)
        return self._at_once(parts, rules, row, by_stack(self.statistics))

    @cache  # noqa: B019
    def _allocation(self, bits: str) -> jq.allocation.Allocation:
        """The options of the stacks of layers, by what rounding to nearest would cost."""
        options = {
            name: dataclasses.replace(option, range=jq.MinMSE())
            for name, option in rows.OPTIONS[bits].items()
        }
        params = {**self.model.params, "layers": _stacks(self.model.params["layers"][0])}
        found = jq.allocate(
            self._apply,
            params,
            self.batches[:_MEASURED],
            options,
            bits_per_weight(self.quantized(bits, "nearest")["layers"]),
            rules=[jq.Rule("embedding", None), *language.rules(jq.ArrayConfig())[1:]],
            size=jq.allocation.dense_bits,
            progress=True,
        )
        print(found)
        return found

    @property
    def _apply(self) -> Any:
        return partial(language.apply, config=self.model.config)


def by_stack(statistics: Mapping[str, Any]) -> dict[str, dict[Any, Any]]:
    """Statistics of one stack of all layers as those of its parts, layers/0, layers/1, ..."""
    out: dict[str, dict[Any, Any]] = {}
    for path, found in statistics.items():
        for kind, statistic in found.items():
            for i, part in enumerate(_stacks(statistic)):
                out.setdefault(path.replace("/0/", f"/{i}/", 1), {})[kind] = part
    return out


def _stacks(tree: Any) -> list[Any]:
    """The parts of a tree of stacked layers that `allocate` may treat differently."""
    (count,) = {len(x) for x in jax.tree.leaves(tree)}
    return [jax.tree.map(lambda x, i=i: x[i : i + _STACK], tree) for i in range(0, count, _STACK)]


def bits_per_weight(layers: Any) -> float:
    """Bits of the quantized arrays of a tree over their number of elements, in packed files."""
    leaves = jax.tree.leaves(layers, is_leaf=jq.tree.is_quantized)
    quantized = [x for x in leaves if jq.tree.is_quantized(x)]
    return sum(map(jq.allocation.dense_bits, quantized)) / sum(x.size for x in quantized)
