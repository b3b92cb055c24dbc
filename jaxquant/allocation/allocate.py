"""Allocates bits: measures what each option costs, and solves for the best choice."""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import INT2, ArrayConfig, QTensor, Scheme, normalize_axes
from ..jaxprs import split_arrays
from ..lift import lift
from ..methods import Nearest
from ..methods.internal import stack_axes
from ..tree import Progress, Rule, Rules, default_rules
from ..tree import quantize as quantize_tree
from ..tree.internal import REGEX, Plan, effective, matched, progress_bar, select
from .allocation import Allocation, AllocationRow
from .losses import sampled_token
from .probe import probed
from .sizes import stored_bits

# A scheme or a config, alone or with the method that chooses the codes.
Option = Scheme | ArrayConfig | tuple[Scheme | ArrayConfig, Any]


def allocate(
    apply: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    options: Mapping[str, Option],
    bits_per_weight: float = 4.5,
    *,
    loss: Callable[[Any, jax.Array], jax.Array] = sampled_token,
    rules: Rules | None = None,
    statistics: Mapping[str, Any] | None = None,
    together: Sequence[str] = (),
    size: Callable[[QTensor], float] = stored_bits,
    row_axes: int | None = None,
    key: jax.Array | None = None,
    progress: Progress | bool | None = None,
) -> Allocation:
    """Chooses an option for each parameter: the least predicted loss within a budget of bits.

        score(parameter, option) = 1/2 sum over rows x of (g^T dW x)^2 / rows of outputs
        dW = the quantized parameter less the parameter,   g = gradient of the loss of the product

    With `sampled_token`, the score is the Kullback-Leibler divergence per token that the option
    causes, to second order and without the interaction of rows and of parameters. It is too low
    for large errors: in SmolLM2, a mixture with 2 bits by rounding to nearest is worse than 3 bits
    for all. Offer 2 bits only with a method such as GPTQ.

    One pass forward and backward of the float model per batch measures all options. Each parameter
    is quantized by each option once, and its errors are kept in 2 bytes per element and option. A
    mixture is chosen by one multiplier (`allocation/knapsack.py`), within one parameter's
    difference of the optimum.

    Args:
        apply: (params, batch) -> outputs; any function that `jaxquant.lift` transforms.
        params: tree of float arrays. Stacked layers are one parameter, with one option.
        batches: arguments of apply, one after another; batches of equal shapes compile once.
        options: by name: a Scheme or ArrayConfig, or a pair of it and a method such as
            `jq.methods.GPTQ()`. They should quantize activations alike, because only the errors of
            weights are scored. A parameter whose length the group size does not divide does without
            that option.
        bits_per_weight: the budget: bits of all selected parameters, with scales and all, over
            their number of elements.
        loss: (outputs, key) -> scalar: `sampled_token` for logits, `random_projection` for other
            outputs, or your own.
        rules: which parameters, and the axes that they contract; their schemes are not used. None
            for `default_rules`. A lookup is not a product: leave out embeddings that are not tied
            to the head.
        statistics: for the methods of the options, from `jq.collect` with the same rules.
        together: patterns of parameters that must share an option, such as the queries, keys and
            values of a layer in a fused kernel: "layers/*/attention/[qkv]/kernel" makes one group
            for each text that its wildcards match.
        size: (QTensor) -> bits: `stored_bits` for device memory, `dense_bits` for packed files.
        row_axes: leading axes of rows whose elements are squared each: 1 adds the tokens of each
            sequence of a (sequences, tokens) batch first, which counts their interaction, but needs
            several dozen sequences, because each gives one sample. None squares all rows, and
            underestimates values, whose errors attention adds up (three times in SmolLM2, where 32
            sequences with 1 predict what is measured).
        key: random key for the samples; None for key 0.
        progress: as for `tree.quantize`, per batch.

    Returns:
        Allocation: `rules` for `tree.quantize`, a table, a picture.

    Warns:
        UserWarning: an option is symmetric INT2, which has three levels.

    Raises:
        ValueError: the budget is below the smallest options; no option fits a parameter; there are
            statistics, but no option has a method; a parameter meets no product, or is reshaped
            before; a score is NaN; or as for `tree.quantize`.

    Source: Fisher information as in Theis et al. 2018, arXiv:1801.05787, eq. 8; the coupling of
        outputs as in Tseng et al. 2025 (YAQA), arXiv:2505.22988.

    Example:
        >>> params = {"a": jnp.eye(64), "b": 0.1 * jnp.eye(64)}
        >>> def apply(params, x):
        ...     return x @ params["a"] + x @ params["b"]
        >>> w4 = jq.ArrayConfig(format=jq.INT4, range=jq.MinMSE())
        >>> found = jq.allocate(
        ...     apply, params, [jnp.ones((8, 64))], {"4 bits": w4, "8 bits": jq.W8A16}, 9.0
        ... )
        >>> found.bits_per_weight <= 9
        True
        >>> q = jq.tree.quantize(params, found.rules)
    """
    pairs = {name: _as_pair(name, option) for name, option in options.items()}
    if not pairs:
        raise ValueError(f"options must not be empty; got {options!r}.")
    if any(method is not None for _, method in pairs.values()):
        # `tree.quantize` raises an error for statistics without a method.
        pairs = {name: (scheme, method or Nearest()) for name, (scheme, method) in pairs.items()}
    elif statistics:
        raise ValueError(
            f"statistics must go with a method; got the options {', '.join(pairs)} without one. "
            "Pass an option as (scheme, method), or leave out statistics."
        )
    chosen = default_rules(ArrayConfig()) if rules is None else rules
    paths, leaves, plans, treedef = select(params, chosen)
    items = {
        i: _item(paths[i], leaves[i], plan, list(pairs.values()), statistics or {}, size)
        for i, plan in enumerate(plans)
        if plan is not None
    }
    key = jax.random.key(0) if key is None else key
    if row_axes is not None and not (isinstance(row_axes, int) and row_axes > 0):
        raise ValueError(f"row_axes must be a positive int or None; got {row_axes!r}.")

    def probe(item: _Item, arrays: Any, sums: jax.Array, note: Callable[[str], None]) -> QTensor:
        weight, errors = arrays
        return probed(weight, errors, sums, item.axes, item.path, note, row_axes)

    scores = _scores(apply, leaves, treedef, items, probe, batches, loss, key, progress)
    rows = [
        AllocationRow(item.path, item.leaf.shape, None, item.bits, tuple(scores[i]))
        for i, item in items.items()
    ]
    found = Allocation(
        tuple(rows), tuple(pairs), bits_per_weight, (), _groups([r.path for r in rows], together)
    )
    found = found.within(bits_per_weight)
    names = list(pairs)
    new_rules = [
        _rule(item, *pairs[row.option or names[0]])
        for row, item in zip(found.rows, items.values(), strict=True)
    ]
    return dataclasses.replace(found, rules=tuple(new_rules))


def _as_pair(name: str, option: Any) -> tuple[Scheme | ArrayConfig, Any]:
    """A scheme or config, and a method or None."""
    scheme, method = option if isinstance(option, tuple) and len(option) == 2 else (option, None)
    if not isinstance(scheme, Scheme | ArrayConfig):
        raise ValueError(
            "An option must be a Scheme or an ArrayConfig, or a pair of one and a method; got "
            f"{option!r} for {name!r}."
        )
    config = scheme.weights if isinstance(scheme, Scheme) else scheme
    if config.format == INT2 and config.symmetric:
        warnings.warn(
            f"Option {name!r} is symmetric INT2, which has only three levels, -1, 0 and 1. Use "
            "symmetric=False.",
            stacklevel=3,
        )
    return scheme, method


@dataclasses.dataclass(frozen=True, eq=False)
class _Item:
    """One parameter.

    Attributes:
        path, leaf: of the parameter.
        plan: from the rules.
        axes: contracted axes, from 0 up.
        errors: dW of each option, (*shape, options), bfloat16; 0 where it does not fit.
        bits: of each option; inf where it does not fit.
    """

    path: str
    leaf: jax.Array
    plan: Plan
    axes: tuple[int, ...]
    errors: jax.Array
    bits: tuple[float, ...]


def _item(
    path: str,
    leaf: Any,
    plan: Plan,
    options: Sequence[tuple[Any, Any]],
    statistics: Mapping[str, Any],
    size: Callable[[QTensor], float],
) -> _Item:
    """Quantizes one parameter by each option."""
    leaf = jnp.asarray(leaf)
    axes = normalize_axes(plan.axis, leaf.ndim)
    errors, bits, reasons = [], [], []
    for scheme, method in options:
        rule = Rule("*", scheme, axis=plan.axis, method=method)
        try:
            q = quantize_tree({path: leaf}, rule, statistics=statistics)[path]
        except ValueError as error:
            reasons.append(str(error).splitlines()[-1].strip())
            errors.append(jnp.zeros(leaf.shape, jnp.bfloat16))
            bits.append(math.inf)
            continue
        errors.append((effective(q, axes) - leaf).astype(jnp.bfloat16))
        bits.append(float(size(q)))
    if len(reasons) == len(options):
        raise ValueError(
            f"No option fits a parameter: {reasons[0]} Add an option that does, or leave it out "
            f"with Rule({path!r}, None)."
        )
    return _Item(path, leaf, plan, axes, jnp.stack(errors, -1), tuple(bits))


def _scores(
    apply: Callable[[Any, Any], Any],
    leaves: Sequence[Any],
    treedef: Any,
    items: Mapping[int, _Item],
    probe: Callable[..., QTensor],
    batches: Iterable[Any],
    loss: Callable[[Any, jax.Array], jax.Array],
    key: jax.Array,
    progress: Progress | bool | None,
) -> dict[int, list[float]]:
    """The score of each option of each item."""
    reached: set[str] = set()
    note = _Note(reached)
    rest, whole = split_arrays([None if i in items else x for i, x in enumerate(leaves)])
    lifted = lift(apply)

    def total(sums, arrays, rest, batch, key):
        filled = list(whole(rest))
        for i, item in items.items():
            filled[i] = probe(item, arrays[i], sums[i], note)
        outputs = lifted(jax.tree.unflatten(treedef, filled), batch)
        return loss(outputs, key), _count(outputs)

    run = jax.jit(jax.grad(total, has_aux=True))
    arrays = {i: (item.leaf, item.errors) for i, item in items.items()}
    zeros = {i: jnp.zeros(_sums_shape(item), jnp.float32) for i, item in items.items()}
    sums = {i: np.zeros(len(item.bits)) for i, item in items.items()}
    rows = 0
    count = len(batches) if isinstance(batches, Sized) else None
    with progress_bar(progress, count, "Measuring") as report:
        for done, batch in enumerate(batches, 1):
            found, new = run(zeros, arrays, rest, batch, jax.random.fold_in(key, done))
            for i, x in found.items():
                sums[i] += np.asarray(x, np.float64).sum(tuple(range(x.ndim - 1)))
            rows += int(new)
            report(done, count, f"batch {done}")
    _check_scores(items, reached, sums, rows)
    fits = {i: np.isfinite(item.bits) for i, item in items.items()}
    return {i: np.where(fits[i], x / (2 * rows), np.inf).tolist() for i, x in sums.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class _Note:
    """Notes the paths of parameters that products were traced for. Hashable, by identity."""

    paths: set[str]

    def __call__(self, path: str) -> None:
        self.paths.add(path)


def _sums_shape(item: _Item) -> tuple[int, ...]:
    """One sum per slice that a scan may make, and option."""
    leading = item.leaf.shape[: stack_axes(item.leaf.ndim, item.axes)]
    return (*leading, len(item.bits))


def _count(outputs: Any) -> jax.Array:
    """The number of rows of outputs: of the floating-point array that has most of them."""
    floats = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.int32(max((math.prod(x.shape[:-1]) for x in floats), default=0))


def _check_scores(
    items: Mapping[int, _Item], reached: set[str], sums: Mapping[int, np.ndarray], rows: int
) -> None:
    if not rows:
        raise ValueError(f"batches must have at least one row of outputs; got {rows}.")
    for i, item in items.items():
        if item.path not in reached:
            raise ValueError(
                f"{item.path} met no product of activations in any batch, so that no score can be "
                f"measured. Leave it out with a rule, Rule({item.path!r}, None)."
            )
        if not np.all(np.isfinite(sums[i])):
            raise ValueError(
                f"{item.path}: scores must be finite; got {sums[i]}. Check the batches and the "
                "loss for NaN and Inf."
            )


def _groups(paths: Sequence[str], together: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Indices of the rows that share an option."""
    group_of: dict[str, tuple[str, ...]] = {path: (path,) for path in paths}
    for pattern in [together] if isinstance(together, str) else together:
        for key, path, _ in matched(pattern, -1, paths):
            group_of[path] = (pattern, *key)
    keys = dict.fromkeys(group_of.values())
    return tuple(tuple(i for i, p in enumerate(paths) if group_of[p] == key) for key in keys)


def _rule(item: _Item, scheme: Scheme | ArrayConfig, method: Any) -> Rule:
    return Rule(REGEX + re.escape(item.path), scheme, axis=item.plan.axis, method=method)
