"""Calibration: static scales of activations, from batches that run through the model."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..calibration import Observer, PercentileHistogram
from ..calibration.internal import check_arrays
from ..core import QTensor, quantize_with_range, scale_values
from ..jaxprs import split_arrays
from ..ops import Activations
from ..tree import Progress, Rules
from ..tree import quantize as quantize_tree
from ..tree.internal import leaves_with_paths, progress_bar
from .prepare import Prepared


def calibrate(
    apply: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Rules | None = None,
    *,
    observer: Observer | None = None,
    progress: Progress | bool | None = None,
) -> Any:
    """Runs batches through a model and sets static scales for the activations of its weights.

        scale = scale of the range that an observer found in all activations multiplied by the
        weight, over all batches; activations are not quantized meanwhile

    Each batch runs in one compiled program that sends the activations to the host, where those of
    one batch stay in memory until the observers have seen them. Stacked weights that `lax.scan`
    slices get one scale per slice.

    Args:
        apply: (params, batch) -> anything, written with jaxquant's operations.
        params: tree of float arrays, with rules; or, without rules, a tree from `tree.quantize` or
            `prepare`.
        batches: arguments of apply, one after another; batches of equal shapes compile once.
        rules: as for `tree.quantize`.
        observer: one that has not seen any data; None for `PercentileHistogram.init()`.
        progress: as for `tree.quantize`, per batch.

    Returns:
        The quantized (or prepared) tree, whose `inputs` have a scale, and a zero point if
        asymmetric.

    Raises:
        ValueError: no scheme quantizes activations, activations are quantized in groups, a weight
            was never used, was sliced in two ways, or met NaN or Inf; or as for `tree.quantize`.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3; Wu et al. 2020, arXiv:2004.09602,
        section 3.

    Example:
        >>> activations = jq.ArrayConfig(per_tensor=True)
        >>> params = {"kernel": jnp.ones((4, 2))}
        >>> batches = [jnp.full((1, 4), 127.0)]
        >>> q = jq.training.calibrate(
        ...     lambda p, x: jq.matmul(x, p["kernel"]),
        ...     params, batches, jq.Scheme(jq.ArrayConfig(), activations),
        ...     observer=jq.training.RunningAbsMax.init(),
        ... )
        >>> float(q["kernel"].inputs.scale)
        1.0
    """
    tree = params if rules is None else quantize_tree(params, rules)
    paths, found, treedef = leaves_with_paths(tree, _is_weight)
    leaves = dict(zip(paths, found, strict=True))
    _check(leaves)
    first = PercentileHistogram.init() if observer is None else observer
    waiting, seen = [], {}
    tapped = [_tapped(x, path, waiting) if _has_inputs(x) else x for path, x in leaves.items()]
    arrays, whole = split_arrays(jax.tree.unflatten(treedef, tapped))
    run = jax.jit(lambda arrays, batch: apply(whole(arrays), batch))
    total = len(batches) if isinstance(batches, Sized) else None
    with progress_bar(progress, total, "Calibrating") as report:
        for done, batch in enumerate(batches, 1):
            check_arrays(batch)
            jax.block_until_ready(run(arrays, batch))
            jax.effects_barrier()
            while waiting:
                path, number, x = waiting.pop(0)
                observers = seen.setdefault((path, number.shape), {})
                slice_ = int(number.flat[0])
                observers[slice_] = observers.get(slice_, first).update(x)
            report(done, total, f"batch {done}")
    scaled = [_scaled(x, path, seen) if _has_inputs(x) else x for path, x in leaves.items()]
    return jax.tree.unflatten(treedef, scaled)


def _check(leaves):
    weights = {path: x for path, x in leaves.items() if _has_inputs(x)}
    if not weights:
        raise ValueError(
            f"No weight has inputs to calibrate; got {', '.join(list(leaves)[:8]) or 'no leaf'}. "
            "Use a scheme that quantizes activations, such as W8A8."
        )
    for path, weight in weights.items():
        config = weight.inputs.config
        if config.group_size is not None or config.format.group_size is not None:
            raise ValueError(
                f"{path}: a static scale is one for the whole operand; got inputs in groups, "
                f"{config!r}. Do not calibrate them: their scales are computed at run time."
            )


def _is_weight(x):
    return isinstance(x, QTensor | Prepared)


def _has_inputs(x):
    return _is_weight(x) and x.inputs is not None and x.inputs.config is not None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Tap:
    """Sends activations to the host, with the indices of the weight slices they meet."""

    numbers: jax.Array
    take: Callable[..., None] = dataclasses.field(metadata={"static": True})

    def __call__(self, activations: Activations):
        jax.debug.callback(self.take, self.numbers, activations.values)


def _tapped(weight, path, waiting):
    """The weight with unquantized activations and a tap: one index for each matrix in it."""
    leading = weight.shape[:-2]
    numbers = jnp.arange(math.prod(leading), dtype=jnp.int32).reshape(leading)

    def take(numbers, x):
        waiting.append((path, np.asarray(numbers), np.asarray(x)))

    inputs = dataclasses.replace(
        weight.inputs, config=None, scale=None, zero_point=None, tap=_Tap(numbers, take)
    )
    return dataclasses.replace(weight, inputs=inputs)


def _scaled(weight: Any, path: str, seen: dict[Any, Any]) -> Any:
    """The weight with the scale of its activations, one for each slice that was used."""
    shapes = [shape for name, shape in seen if name == path]
    if len(shapes) != 1:
        raise ValueError(
            f"{path}: products must all use the whole weight, or slices of one shape; got "
            f"{len(shapes)} shapes, {shapes}. Pass batches that use it, or a rule without inputs."
        )
    leading = weight.shape[:-2]
    sliced = leading[: len(leading) - len(shapes[0])]
    observers = seen[path, shapes[0]]
    numbers = np.arange(math.prod(sliced)) * (math.prod(leading) // max(math.prod(sliced), 1))
    missing = [n for n in numbers.tolist() if n not in observers]
    if missing:
        raise ValueError(
            f"{path}: every slice must be used; got no data for {len(missing)} of "
            f"{len(numbers)}. Pass batches that use them."
        )
    inputs, config = weight.inputs, weight.inputs.config
    try:
        ends = [observers[n].finish(config) for n in numbers.tolist()]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    low, high = (jnp.stack(end).reshape(sliced) for end in zip(*ends, strict=True))
    each = dataclasses.replace(config, per_tensor=False, group_size=None)
    q = quantize_with_range(jnp.zeros(sliced), low, high, each, axis=())
    zero_point = q.zero_point
    if isinstance(weight, Prepared) and zero_point is not None:
        # A float zero point is trained; `convert` keeps it.
        zero_point = zero_point.astype(jnp.float32)
    inputs = dataclasses.replace(inputs, scale=scale_values(q.scale), zero_point=zero_point)
    return dataclasses.replace(weight, inputs=inputs)
