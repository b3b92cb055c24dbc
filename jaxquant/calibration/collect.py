"""Statistics of the activations that each parameter of a model meets, summed over batches."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sized
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import Format, Inputs, QTensor, normalize_axes
from ..jaxprs import is_sharded, run_with_out_sharding, split_arrays
from ..lift import lift
from ..methods import CrossMoment, Statistic
from ..methods.internal import stack_axes
from ..ops import Activations
from ..tree import Progress, Rules
from ..tree import dequantize as dequantize_tree
from ..tree.internal import leaves_with_paths, progress_bar, select
from .collected import Statistics, kinds_of

# Name of the axis of the two models whose activations `CrossMoment` compares.
PAIR = "float and quantized"


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
        ValueError: a leaf was not reached, or met NaN or Inf; the mask does not fit the rows;
            `quantized` is missing for `CrossMoment`, or is not a tree like params; or as for
            `tree.quantize`.

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
        paths, leaves, plans, self._treedef = select(params, rules)
        self._tappers = {
            i: _Tapper(path, leaf.shape, normalize_axes(plan.axis, leaf.ndim), tuple(kinds))
            for i, (path, leaf, plan) in enumerate(zip(paths, leaves, plans, strict=True))
            if plan is not None
        }
        self._has_pairs = CrossMoment in kinds
        self._run = _compiled(apply, leaves, self._treedef, self._tappers, mask, self._has_pairs)

    def __call__(
        self,
        params: Any,
        batches: Iterable[Any],
        quantized: Any = None,
        allow_missing: bool = False,
        progress: Progress | bool | None = None,
    ) -> Statistics:
        """The statistics of a tree; arguments as for `collect`."""
        leaves = jax.tree.leaves(params)
        selected, rest = _parted(leaves, self._tappers)
        if self._has_pairs:
            others = _others(quantized, self._treedef)
            selected = {i: jnp.stack([jnp.asarray(x), others[i]]) for i, x in selected.items()}
        arrays, _ = split_arrays(rest)
        total = len(batches) if isinstance(batches, Sized) else None
        with progress_bar(progress, total, "Collecting") as report:
            for done, batch in enumerate(batches, 1):
                self._add(selected, arrays, batch)
                report(done, total, f"batch {done}")
        found = {tapper.path: tapper.finish(allow_missing) for tapper in self._tappers.values()}
        return Statistics(found, is_complete=not allow_missing)

    def _add(self, selected: Any, arrays: Any, batch: Any) -> None:
        """Runs a batch and adds its sums."""
        self._run(selected, arrays, batch)
        jax.effects_barrier()
        for tapper in self._tappers.values():
            tapper.add()


def _others(quantized: Any, treedef: Any) -> list[Any]:
    """The leaves of the quantized tree as floats, whose activations are compared."""
    if quantized is None:
        raise ValueError(
            "CrossMoment compares activations with those of a quantized model; got "
            f"quantized={quantized}. Pass the result of tree.quantize."
        )
    _, leaves, other = leaves_with_paths(dequantize_tree(quantized))
    if other != treedef:
        raise ValueError(
            f"quantized must be a tree like params; got {other}, and params is {treedef}."
        )
    return leaves


def _parted(leaves: list[Any], chosen: Iterable[int]) -> tuple[dict[int, Any], list[Any]]:
    """The chosen leaves by number, and all others, with None in their place."""
    selected = {i: leaves[i] for i in chosen}
    return selected, [None if i in selected else leaf for i, leaf in enumerate(leaves)]


def _compiled(
    apply: Callable[[Any, Any], Any],
    leaves: list[Any],
    treedef: Any,
    tappers: Mapping[int, "_Tapper"],
    mask: Callable[[Any], jax.Array] | None,
    has_pairs: bool,
) -> Callable[[Any, Any, Any], None]:
    """A function (selected leaves, other arrays, batch) that runs the model with taps."""
    lifted = lift(apply)

    def model(selected, rest, batch, weights):
        tapped = {i: tapper.tapped(selected[i], weights) for i, tapper in tappers.items()}
        filled = [tapped.get(i, leaf) for i, leaf in enumerate(rest)]
        return lifted(jax.tree.unflatten(treedef, filled), batch)

    def pair(selected, rest, batch, weights):
        run = partial(model, rest=rest, batch=batch, weights=weights)
        return jax.vmap(run, axis_name=PAIR)(selected)

    _, whole = split_arrays(_parted(leaves, tappers)[1])

    @jax.jit
    def run(selected, arrays, batch):
        weights = None if mask is None else jnp.asarray(mask(batch), jnp.float32)
        (pair if has_pairs else model)(selected, whole(arrays), batch, weights)
        # Not the model's results, so that XLA computes only what the sums need.

    return run


@dataclasses.dataclass(eq=False)
class _Tapper:
    """Collects the sums of one parameter.

    Attributes:
        path: of the parameter.
        shape: its shape.
        axes: those that are contracted.
        kinds: which statistics.
        waiting: (slice numbers, sums) of the batch that is running.
        sums: by the shape of slices, then by slice.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    kinds: tuple[type[Statistic], ...]
    waiting: list[Any] = dataclasses.field(default_factory=list)
    sums: dict[tuple[int, ...], dict[int, Any]] = dataclasses.field(default_factory=dict)

    @property
    def leading(self) -> tuple[int, ...]:
        """The lengths of the axes that may be stacked layers or experts."""
        return self.shape[: stack_axes(len(self.shape), self.axes)]

    @property
    def channels(self) -> int:
        """The number of contracted elements."""
        return math.prod(self.shape[a] for a in self.axes)

    def tapped(self, weight: jax.Array, mask: jax.Array | None) -> QTensor:
        """A float array with a tap: the codes are its elements, and all scales are 1."""
        weight = jnp.asarray(weight)
        info = jnp.finfo(weight.dtype)
        name = str(weight.dtype)
        format = Format(name, name, float(info.min), float(info.max))
        scale = [1 if a in self.axes else n for a, n in enumerate(self.shape)]
        numbers = jnp.arange(math.prod(self.leading), dtype=jnp.int32).reshape(self.leading)
        if mask is not None:
            mask = jnp.broadcast_to(mask, (*self.leading, *mask.shape))
        tap = _Tap(
            numbers,
            mask,
            path=self.path,
            channels=self.channels,
            slice_size=math.prod(self.shape[len(self.leading) :]),
            kinds=self.kinds,
            take=self.take,
        )
        return QTensor(
            weight,
            jnp.ones(scale, jnp.float32),
            inputs=Inputs(tap=tap),
            format=format,
            dtype=weight.dtype,
        )

    def take(self, numbers: Any, *sums: Any) -> None:
        """Keeps the sums of one product until the program has ended."""
        numbers = np.asarray(numbers)
        self.waiting.append((numbers, [jax.tree.map(np.asarray, s) for s in sums]))

    def add(self) -> None:
        """Adds what waits."""
        while self.waiting:
            numbers, new = self.waiting.pop(0)
            found = self.sums.setdefault(numbers.shape, {})
            first = int(numbers.flat[0])
            old = found.get(first)
            pairs = zip(old or new, new, strict=True)
            found[first] = [b if old is None else a.merge(b) for a, b in pairs]

    def finish(self, allow_missing: bool) -> dict[type[Statistic], Any]:
        """The statistics of all slices, stacked."""
        if len(self.sums) > 1:
            raise ValueError(
                f"{self.path}: products must all use the whole parameter, or slices of one shape; "
                f"got {sorted(self.sums)}. Exclude it with a rule, Rule({self.path!r}, None)."
            )
        shape, found = next(iter(self.sums.items()), (self.leading, {}))
        self.sums = {}
        sliced = self.leading[: len(self.leading) - len(shape)]
        step = math.prod(self.leading) // max(math.prod(sliced), 1)
        numbers = [n * step for n in range(math.prod(sliced))]
        absent = [n for n in numbers if n not in found]
        if absent and not allow_missing:
            raise ValueError(
                f"{self.path}: no batch reached {len(absent)} of its {len(numbers)} slices in a "
                "product or an ungrouped convolution. Pass batches that use it, a rule that leaves "
                "it out, or allow_missing=True to round it to nearest."
            )
        if not found:
            empty = (kind.init(self.channels) for kind in self.kinds)
            found = {0: [jax.tree.map(np.asarray, statistic) for statistic in empty]}
        empty = [jax.tree.map(np.zeros_like, s) for s in next(iter(found.values()))]
        rows = [found.get(n, empty) for n in numbers]
        stacked = [
            jax.tree.map(lambda *s: np.stack(s).reshape((*sliced, *s[0].shape)), *column)
            for column in zip(*rows, strict=True)
        ]
        for statistic in stacked:
            self._check(statistic, allow_missing)
        return dict(zip(self.kinds, stacked, strict=True))

    def _check(self, statistic: Statistic, allow_missing: bool) -> None:
        if not np.all(np.isfinite(statistic.total)):
            raise ValueError(
                f"{self.path}: activations must be finite; got NaN or Inf. Check the batches, or "
                "pass a mask if the padding holds them."
            )
        unused = int(np.sum(statistic.count == 0))
        if unused and not allow_missing:
            raise ValueError(
                f"{self.path}: no row reached {unused} of its {statistic.count.size} slices, such "
                "as experts that no token chose. Pass more batches, or "
                "allow_missing=True to round them to nearest."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Tap:
    """Sums statistics of activations, and sends them to the host.

    Attributes:
        numbers: the indices of the slices of the parameter that is multiplied.
        mask: for each of them, the weights of the rows, if any.
        path: of the parameter, static.
        channels: number of its contracted elements, static.
        slice_size: number of elements of one slice, static.
        kinds: which statistics, static.
        take: gets the numbers and the sums, static.
    """

    numbers: jax.Array
    mask: jax.Array | None
    path: str = dataclasses.field(kw_only=True, metadata={"static": True})
    channels: int = dataclasses.field(kw_only=True, metadata={"static": True})
    slice_size: int = dataclasses.field(kw_only=True, metadata={"static": True})
    kinds: tuple[type[Statistic], ...] = dataclasses.field(kw_only=True, metadata={"static": True})
    take: Callable[..., None] = dataclasses.field(kw_only=True, metadata={"static": True})

    def __call__(self, activations: Activations) -> None:
        x = activations.unfolded()
        if x is None:
            return
        self._check(activations, x.shape[-1])
        batch = activations.batch
        weights = self._weights(x.shape[batch:-1])
        x = x.reshape(*x.shape[:batch], weights.size, x.shape[-1])

        def sums(x: jax.Array, weights: jax.Array) -> list[Statistic]:
            pair = None
            if CrossMoment in self.kinds:
                # Both models run side by side, as two examples of a batch.
                pair = jax.lax.all_gather(x, PAIR)
                x, pair = pair[0], jnp.moveaxis(pair, 0, batch)
            return [
                _sum(kind, pair if kind is CrossMoment else x, weights, activations)
                for kind in self.kinds
            ]

        # XLA adds the parts of several devices.
        replicated = jax.typeof(x).sharding.update(spec=jax.P()) if is_sharded(x) else None
        found = run_with_out_sharding(sums, replicated, x, weights)
        jax.debug.callback(self.take, self.numbers, *found)

    def _check(self, activations: Activations, channels: int) -> None:
        if not activations.is_along_scales or channels != self.channels:
            raise ValueError(
                f"{self.path}: products must contract the axes of its rule, of {self.channels} "
                f"channels; got {activations.operation} of {activations.stored_shape} along "
                f"others, of {channels}. Correct the axis of the rule; or exclude the parameter, "
                f"Rule({self.path!r}, None), if it is used along several axes, as tied weights are."
            )
        size = math.prod(activations.stored_shape)
        if self.numbers.size > 1 and size != self.numbers.size * self.slice_size:
            raise ValueError(
                f"{self.path}: products must use the whole stack, or slices that lax.scan makes; "
                f"got {activations.operation} of {activations.stored_shape}. Keep the layers as "
                "separate parameters, run them with lax.scan, or exclude them, "
                f"Rule({self.path!r}, None)."
            )

    def _weights(self, shape: tuple[int, ...]) -> jax.Array:
        """The weight of each row, (rows,)."""
        rows = math.prod(shape)
        if self.mask is None:
            return jnp.ones(rows, jnp.float32)
        depth = self.numbers.ndim
        mask = self.mask[(0,) * depth]
        is_flat = shape[:1] == (mask.size,)
        if not is_flat and shape[: mask.ndim] != mask.shape:
            raise ValueError(
                f"{self.path}: the mask must have the shape of the leading axes of its rows; got "
                f"{mask.shape} for rows {shape}. Collect without a mask, or leave it out."
            )
        return jnp.repeat(mask.ravel(), rows // max(mask.size, 1))


def _sum(kind: type[Statistic], x: Any, weights: jax.Array, activations: Activations) -> Statistic:
    """The statistic of one product, with an axis per batch axis, or for the groups of rows."""
    update: Callable[..., Statistic] = kind.init(x.shape[-1]).update
    if activations.group_sizes is not None:
        ends = jnp.cumsum(activations.group_sizes)
        group = jnp.searchsorted(ends, jnp.arange(weights.size), side="right")

        def of_group(number: jax.Array) -> Statistic:
            return update(x, weights * (group == number).astype(weights.dtype))

        return jax.lax.map(of_group, jnp.arange(ends.size))
    for _ in range(activations.batch):
        update = jax.vmap(update, (0, None))
    return update(x, weights)
