"""Statistics of the activations that each parameter of a model meets, summed over batches."""

from collections.abc import Callable, Iterable, Mapping, Sized
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..core import normalize_axes
from ..jaxprs import is_tracer, split_arrays
from ..lift import lift
from ..methods import CrossMoment
from ..tree import Progress, Rules
from ..tree import dequantize as dequantize_tree
from ..tree.internal import check_like, progress_bar, select
from .batches import check_arrays
from .collected import Statistics, kinds_of
from .sums import Sums
from .tap import PAIR, Parameter, with_statistics


def collect(
    apply: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Rules,
    statistics: Any,
    *,
    mask: Callable[[Any], jax.Array] | None = None,
    quantized: Any = None,
    allow_missing: bool = False,
    progress: Progress | bool | None = None,
) -> Statistics:
    """Runs batches through a float model and sums statistics of the activations of its weights.

        S = sum over rows x of f(x), and their number           (x x^T, x^2, |x|, max|x|)

    Sums are computed in float32 at the highest precision within the compiled program; the host adds
    those of each batch. Layers that `lax.scan` slices, experts of ragged products and matrices of
    batched products get one sum per slice.

    Args:
        apply: (params, batch) -> anything; any function that `jaxquant.lift` transforms.
        params: tree of float arrays.
        batches: arguments of apply, one after another; batches of equal shapes compile once.
        rules: as for `tree.quantize`: which leaves, and the axes that they contract.
        statistics: statistics, methods that need some, or a list of either.
        mask: (batch) -> array that is 0 for padding, in the shape of the leading axes of the rows,
            such as (sentences, tokens); None counts all rows.
        quantized: for `CrossMoment`: the quantized tree, which runs on the same batches.
        allow_missing: whether a leaf, or a slice of it, that meets no activations is rounded to
            nearest; otherwise it is an error.
        progress: as for `tree.quantize`, per batch.

    Returns:
        Statistics: a mapping from path to {class: statistic}.

    Raises:
        ValueError: batches are one batch, empty, or not of arrays; a leaf was not reached, or met
            NaN or Inf; the mask does not fit the rows; `quantized` is missing for `CrossMoment`, or
            is not a tree like params; or as for `tree.quantize`.

    Source: Frantar et al. 2022 (GPTQ), arXiv:2210.17323; Lin et al. 2023 (AWQ), arXiv:2306.00978.

    Example:
        >>> params = {"kernel": jnp.ones((4, 2))}
        >>> def apply(params, x):
        ...     return x @ params["kernel"]
        >>> batches = [jnp.full((3, 4), 2.0)]
        >>> found = jq.collect(apply, params, batches, jq.W8A8, jq.methods.MeanSquare)
        >>> found["kernel"][jq.methods.MeanSquare].finish().tolist()
        [4.0, 4.0, 4.0, 4.0]
    """
    collector = Collector(apply, params, rules, statistics, mask)
    return collector(params, batches, quantized, allow_missing, progress)


class Collector:
    """`collect` for several trees of the same structure and shapes, with one compiled program."""

    def __init__(
        self,
        apply: Callable[[Any, Any], Any],
        params: Any,
        rules: Rules,
        statistics: Any,
        mask: Callable[[Any], jax.Array] | None = None,
    ):
        kinds = kinds_of(statistics)
        if is_tracer(new := jnp.zeros(())):
            raise ValueError(
                "collect adds the sums of batches on the host; got a call within a function that "
                f"JAX traces, where arrays are {type(new).__name__}s. Call it outside of jax.jit."
            )
        paths, leaves, plans, treedef = select(params, rules)
        self._sums = {
            i: Sums(Parameter(path, leaf.shape, normalize_axes(plan.axis, leaf.ndim)), tuple(kinds))
            for i, (path, leaf, plan) in enumerate(zip(paths, leaves, plans, strict=True))
            if plan is not None
        }
        self._has_pairs = CrossMoment in kinds
        # The selected leaves in the order in which the model, once it ran, multiplies with them.
        self.order: list[int] = []
        self._run = _compiled(apply, leaves, treedef, self._sums, mask, self._has_pairs, self._meet)

    def __call__(
        self,
        params: Any,
        batches: Iterable[Any],
        quantized: Any = None,
        allow_missing: bool = False,
        progress: Progress | bool | None = None,
        only: Iterable[int] | None = None,
    ) -> Statistics:
        """The statistics of a tree; arguments as for `collect`, `only` the numbers of leaves."""
        # Arrays without axes have `__iter__` and raise in it.
        is_scalar = getattr(batches, "ndim", None) == 0
        if is_scalar or isinstance(batches, Mapping | str) or not isinstance(batches, Iterable):
            raise ValueError(
                "batches must be a list of what the model is called with, or another iterable; got "
                f"a {type(batches).__name__}. Pass batches=[x] for one batch x."
            )
        chosen = tuple(self._sums if only is None else only)
        leaves = jax.tree.leaves(params)
        selected, rest = _parted(leaves, self._sums)
        if self._has_pairs:
            others = _others(quantized, params)
            selected = {i: jnp.stack([jnp.asarray(x), others[i]]) for i, x in selected.items()}
        arrays, _ = split_arrays(rest)
        total, done = len(batches) if isinstance(batches, Sized) else None, 0
        with progress_bar(progress, total, "Collecting") as report:
            for done, batch in enumerate(batches, 1):
                self._add(selected, arrays, batch, chosen)
                report(done, total, f"batch {done}")
        if not done and not allow_missing:
            raise ValueError(
                f"batches must hold at least one batch; got a {type(batches).__name__} without "
                "any. Pass batches=[x, ...], what the model is called with; an iterator serves "
                "only once."
            )
        sums = [self._sums[i] for i in chosen]
        found = {s.parameter.path: s.finish(allow_missing) for s in sums}
        return Statistics(found, is_complete=not allow_missing)

    def _add(self, selected: Any, arrays: Any, batch: Any, chosen: tuple[int, ...]) -> None:
        """Runs a batch and adds its sums."""
        check_arrays(batch)
        self._run(selected, arrays, batch, chosen)
        jax.effects_barrier()
        for i in chosen:
            self._sums[i].add()

    def _meet(self, number: int) -> None:
        if number not in self.order:
            self.order.append(number)


def _others(quantized: Any, params: Any) -> list[Any]:
    """The leaves of the quantized tree as floats, whose activations are compared."""
    if quantized is None:
        raise ValueError(
            "CrossMoment compares activations with those of a quantized model; got "
            f"quantized={quantized}. Pass the result of tree.quantize."
        )
    check_like("quantized", quantized, "params", params)
    return jax.tree.leaves(dequantize_tree(quantized))


def _parted(leaves: list[Any], chosen: Iterable[int]) -> tuple[dict[int, Any], list[Any]]:
    """The chosen leaves by number, and all others, with None in their place."""
    selected = {i: leaves[i] for i in chosen}
    return selected, [None if i in selected else leaf for i, leaf in enumerate(leaves)]


def _compiled(
    apply: Callable[[Any, Any], Any],
    leaves: list[Any],
    treedef: Any,
    sums: Mapping[int, Sums],
    mask: Callable[[Any], jax.Array] | None,
    has_pairs: bool,
    meet: Callable[[int], None],
) -> Callable[[Any, Any, Any, tuple[int, ...]], None]:
    """A function that runs the model with taps.

    Its arguments are the selected leaves, the other arrays, a batch, and, static, the numbers of
    the leaves that get a tap.
    """
    lifted = lift(apply)

    def model(selected, rest, batch, weights, chosen):
        tapped = dict(selected)
        for i in chosen:
            parameter, kinds, take = sums[i].parameter, sums[i].kinds, sums[i].take
            met = partial(meet, i)
            tapped[i] = with_statistics(selected[i], parameter, kinds, weights, take, met)
        filled = [tapped.get(i, leaf) for i, leaf in enumerate(rest)]
        return lifted(jax.tree.unflatten(treedef, filled), batch)

    def pair(selected, rest, batch, weights, chosen):
        run = partial(model, rest=rest, batch=batch, weights=weights, chosen=chosen)
        return jax.vmap(run, axis_name=PAIR)(selected)

    _, whole = split_arrays(_parted(leaves, sums)[1])

    @partial(jax.jit, static_argnums=3)
    def run(selected, arrays, batch, chosen):
        weights = None if mask is None else jnp.asarray(mask(batch), jnp.float32)
        (pair if has_pairs else model)(selected, whole(arrays), batch, weights, chosen)
        # Not the model's results, so that XLA computes only what the sums need.

    return run
