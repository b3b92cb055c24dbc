"""Folds multipliers and rotations of activations into the parameters of a float model.

Which parameters belong together is said by patterns over their paths. Whether the model still
computes the same is not derived from its architecture: it is run before and after.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import check_block, hadamard, hadamard_factors
from .fold_paths import FoldAxes, Matched, Pattern, matched, paired
from .paths import leaves_with_paths
from .rules import CONTRACTED

Patterns = Pattern | Sequence[Pattern]
_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
    """Moves a multiplier m of activations from the kernels that read them to what writes them.

        sources * m,    targets / m along their contracted axis

    Without `multiplier` the source is the gain of a norm, and m = 1 / gain: the gain becomes 1 and
    the kernels absorb it, as rotations need it.

    Attributes:
        sources: pattern, or patterns, of what writes the activations: gains of norms, or kernels
            and biases, whose output axis is -1. ("*/up/kernel", -2) is a pattern with another axis.
        targets: patterns of all kernels that read the activations, whose contracted axis is -2 as
            for kernels (K, N); a pair of a pattern and an axis, or a tuple of axes that are
            flattened, says another. What the wildcards of a pattern match is the layer: it must be
            the same for the targets of a source.
        multiplier: m, (K,), or (layers..., K) for stacked kernels; or a mapping from the path of
            the first source of each layer to it. None for 1 / gain.

    Between sources and targets there may be only what a multiplier passes through, element by
    element: the product of a gated layer, a residual stream that nothing else reads, reshapes.

    Source: Lin et al. 2023 (AWQ), arXiv:2306.00978, section 3.2; Xiao et al. 2022 (SmoothQuant),
        arXiv:2211.10438, section 4.

    Example:
        >>> item = jq.tree.Fold("layers/*/norm", ["layers/*/query", "layers/*/key"])
        >>> item.multiplier is None
        True
    """

    sources: Patterns
    targets: Patterns
    multiplier: Any = None

    def apply(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The leaves that change, in float64.

        Args:
            arrays: all leaves by path.
        """
        paths = list(arrays)
        sources, targets = (
            matched(self.sources, -1, paths),
            matched(self.targets, CONTRACTED, paths),
        )
        _check_untied(sources, targets, "a source and a target")
        operations = (np.multiply, np.divide)
        if self.multiplier is None:
            operations = operations[::-1]
        changed = {}
        for layer in paired(sources, targets):
            factor = self._factor(layer[0], arrays)
            for leaves, operation in zip(layer, operations, strict=True):
                changed |= _each(leaves, operation, factor, arrays)
        return changed

    def _factor(self, own: Matched, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The gain, or the multiplier."""
        path = own[0][1]
        if self.multiplier is None:
            if len(own) > 1:
                raise ValueError(
                    "Without a multiplier, the source of a layer must be the gain of one norm; got "
                    f"{', '.join(path for _, path, _ in own)}. Pass multiplier=."
                )
            gain = _wide(arrays, path)
            if not np.all(gain):
                raise ValueError(
                    f"{path} must have no zeros, which cannot become 1; got "
                    f"{int(np.sum(gain == 0))} of {gain.size}."
                )
            return gain
        given = self.multiplier
        if isinstance(given, Mapping):
            if path not in given:
                raise ValueError(
                    f"multiplier must have an entry for each layer; got none for {path}, but "
                    f"{', '.join(map(str, list(given)[:4]))}."
                )
            given = given[path]
        factor = np.asarray(given, np.float64)
        if not np.all(np.isfinite(factor) & (factor != 0)):
            raise ValueError(f"multiplier must be finite and not 0; got other values for {path}.")
        return factor


@dataclasses.dataclass(frozen=True, eq=False)
class FoldRotation:
    """Rotates activations in what writes and what reads them, at no cost at run time.

        x -> x Q,    writers W -> W Q,    readers W -> Q^T W,    Q = diag(signs) H / sqrt(block)

    For the residual stream of a model with RMS norms, writers are the embedding, and the kernels
    and biases that are added to the stream; readers are the kernels after the norms, and the head.
    Fold the gains of the norms first. Layer norms subtract a mean, which a rotation changes: models
    with them do not pass the check. With tied embeddings the last gain cannot be folded: give the
    model its own head first.

    Attributes:
        writers: patterns as for `Fold.sources`; an embedding (V, K) has the axis -1.
        readers: patterns as for `Fold.targets`.
        norms: patterns of the gains in between, which must all be 1.
        block: length of the blocks that are rotated; None for the number of channels. The same
            signs apply to each block, so that heads can share keys and values.
        seed: of the signs.

    Source: Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456, section 3; Liu et al. 2024 (SpinQuant),
        arXiv:2405.16406, section 3.1.

    Example:
        >>> params = {"embedding": jnp.eye(4), "head": jnp.eye(4)}
        >>> def apply(params, tokens):
        ...     return params["embedding"][tokens] @ params["head"]
        >>> rotation = jq.tree.FoldRotation(writers="embedding", readers="head")
        >>> found = jq.tree.fold(params, [rotation], check=(apply, jnp.arange(4)))
        >>> jnp.abs(found["embedding"])[0].tolist()
        [0.5, 0.5, 0.5, 0.5]
    """

    writers: Patterns
    readers: Patterns
    norms: Patterns = ()
    block: int | None = None
    seed: int = 0

    def apply(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The leaves that change, in float64.

        Args:
            arrays: all leaves by path.
        """
        paths = list(arrays)
        writers, readers = (
            matched(self.writers, -1, paths),
            matched(self.readers, CONTRACTED, paths),
        )
        for _, path, _ in matched(self.norms, -1, paths):
            if not np.allclose(_wide(arrays, path), 1, 0, 1e-6):
                raise ValueError(
                    f"{path} must be 1 between a rotation and its inverse; got other values. Fold "
                    "it into the kernels that follow first, Fold(norm, kernels)."
                )
        # A tied embedding writes and reads along the same axis: it is rotated once.
        leaves = {path: axes for _, path, axes in [*writers, *readers]}
        for _, path, axes in writers:
            if leaves[path] != axes:
                raise ValueError(
                    f"{path} must be rotated along one axis; got {axes} as a writer and "
                    f"{leaves[path]} as a reader."
                )
        return {
            path: self._rotated(_wide(arrays, path), axes, path) for path, axes in leaves.items()
        }

    def _rotated(self, x: np.ndarray, axes: FoldAxes, path: str) -> np.ndarray:
        """x Q along some axes."""
        places = _places(axes, x.ndim, path)
        channels = math.prod(x.shape[a] for a in places)
        block = channels if self.block is None else self.block
        try:
            check_block(block, channels)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        signs = np.random.default_rng([self.seed, block]).choice([-1.0, 1.0], block)
        last = range(x.ndim - len(places), x.ndim)
        moved = np.moveaxis(x, places, last)
        rows = moved.reshape(-1, block) * signs
        return np.moveaxis(rotate_rows(rows).reshape(moved.shape), last, places)


def rotate_rows(rows: np.ndarray) -> np.ndarray:
    """Rows (R, g) times H_g / sqrt(g), in float64."""
    size = rows.shape[-1]
    factors = hadamard_factors(size)
    assert factors is not None, "the caller has checked it"
    inner = 2 ** factors[1]
    split = rows.reshape(-1, size // inner, inner) @ hadamard(inner).astype(np.float64)
    outer = hadamard(size // inner).astype(np.float64)
    return (outer.T @ split).reshape(rows.shape) / math.sqrt(size)


def fold(
    params: Any,
    folds: Sequence[Fold | FoldRotation],
    *,
    check: tuple[Callable[[Any, Any], Any], Any],
    tolerance: float = _TOLERANCE,
) -> Any:
    """Moves multipliers and rotations through the parameters of a float model.

    The folds are applied in order, in float64. Then the model runs with the old and the new
    parameters, and must compute the same; no list of architectures says which folds are valid.

    Args:
        params: tree of float arrays.
        folds: `Fold`s and `FoldRotation`s.
        check: (apply, batch), where apply(params, batch) returns arrays.
        tolerance: the largest relative error of a result, |f(new) - f(old)| / |f(old)| in the
            Euclidean norm, in the dtype of the parameters or, if the model runs in it, in float64.
            Fold in float32 and cast after, or raise it for bfloat16.

    Returns:
        The tree with other values; shapes and dtypes are the same.

    Raises:
        ValueError: the model computes something else; a pattern matches nothing, or leaves that do
            not fit each other; a leaf is not a floating-point array, or is both source and target.

    Example:
        >>> params = {"norm": jnp.array([0.5, 2.0]), "kernel": jnp.array([[4.0], [1.0]])}
        >>> def apply(params, x):
        ...     return (x * params["norm"]) @ params["kernel"]
        >>> batch = jnp.ones((1, 2))
        >>> found = jq.tree.fold(params, [jq.tree.Fold("norm", "kernel")], check=(apply, batch))
        >>> found["norm"].tolist(), found["kernel"].tolist()
        ([1.0, 1.0], [[2.0], [2.0]])
    """
    paths, leaves, treedef = leaves_with_paths(params)
    arrays: dict[str, Any] = dict(zip(paths, leaves, strict=True))
    for item in folds:
        if not isinstance(item, Fold | FoldRotation):
            raise ValueError(f"folds must be Fold or FoldRotation; got {item!r}.")
        arrays |= item.apply(arrays)
    with np.errstate(over="ignore"):  # Inf does not pass the check.
        new = [
            old if x is old else jnp.asarray(x, old.dtype)
            for x, old in zip(arrays.values(), leaves, strict=True)
        ]
    result = jax.tree.unflatten(treedef, new)
    _check_same(params, result, *check, tolerance)
    return result


def _check_same(
    old: Any, new: Any, apply: Callable[[Any, Any], Any], batch: Any, tolerance: float
) -> None:
    error, dtype = _error(old, new, apply, batch), "the dtype of the parameters"
    if not error <= tolerance:
        # Of SmolLM2 in float32, the last bits of its parameters change one row by 1e-3.
        # A model that runs in its own dtype only raises.
        with jax.enable_x64(), contextlib.suppress(TypeError, ValueError):
            error = _error(_in_float64(old), _in_float64(new), apply, batch)
            dtype = "float64"
    if not error <= tolerance:
        raise ValueError(
            f"The folded model must compute the same up to {tolerance:.0e}; got a relative error "
            f"of {error:.1e} in {dtype}. A fold misses a reader or a writer, a gain was not folded "
            "before a rotation, an embedding is tied to the head, or the activations pass through "
            "something that is not linear."
        )


def _error(old: Any, new: Any, apply: Callable[[Any, Any], Any], batch: Any) -> float:
    """The largest relative error of a result."""
    run = jax.jit(apply)
    results = [jax.tree.leaves(run(params, batch)) for params in (old, new)]
    errors = [0.0]
    for pair in zip(*results, strict=True):
        want, got = (np.asarray(x, np.float64) for x in pair)
        size = float(np.linalg.norm(want)) or 1.0
        errors.append(float(np.linalg.norm(got - want)) / size)
    return float(np.max(errors))  # NaN if one is.


def _in_float64(params: Any) -> Any:
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        params,
    )


def _each(
    leaves: Matched, operation: Any, factor: np.ndarray, arrays: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Leaves multiplied with a factor, or divided by it."""
    changed = {}
    for _, path, axes in leaves:
        wide = _wide(arrays, path)
        changed[path] = operation(wide, _aligned(factor, wide.shape, axes, path))
    return changed


def _wide(arrays: Mapping[str, Any], path: str) -> np.ndarray:
    """A leaf in float64."""
    leaf = arrays[path]
    is_array = isinstance(leaf, jax.Array | np.ndarray)
    if not (is_array and jnp.issubdtype(leaf.dtype, jnp.floating)):
        raise ValueError(
            f"{path} must be a floating-point array; got {leaf!r}. Fold before quantizing."
        )
    return np.asarray(leaf, np.float64)


def _check_untied(first: Matched, second: Matched, roles: str) -> None:
    both = {path for _, path, _ in first} & {path for _, path, _ in second}
    if both:
        raise ValueError(
            f"{min(both)} cannot be {roles} at once. If an embedding is tied to the head, give the "
            "model its own head first, as a copy of the embedding."
        )


def _places(axes: FoldAxes, ndim: int, path: str) -> tuple[int, ...]:
    """Axes counted from 0."""
    axes = axes if isinstance(axes, tuple) else (axes,)
    if any(not -ndim <= a < ndim for a in axes):
        raise ValueError(f"{path} has {ndim} axes; got axis {axes}. Give its pattern an axis.")
    return tuple(a % ndim for a in axes)


def _aligned(factor: np.ndarray, shape: tuple[int, ...], axes: FoldAxes, path: str) -> np.ndarray:
    """A factor (layers..., K) in the rank of an array, along its axes."""
    places = _places(axes, len(shape), path)
    stack, lengths = factor.shape[:-1], tuple(shape[a] for a in places)
    is_stacked = shape[: len(stack)] == stack and min(places) >= len(stack)
    if not is_stacked or math.prod(lengths) != factor.shape[-1]:
        raise ValueError(
            f"{path} must have {factor.shape[-1]} channels along axis {axes}, and the stack "
            f"{stack}; got shape {shape}. Give its pattern an axis."
        )
    order = np.argsort(places)
    split = factor.reshape(*stack, *lengths)
    split = split.transpose(*range(len(stack)), *(len(stack) + a for a in order.tolist()))
    kept = (*range(len(stack)), *places)
    return split.reshape([n if a in kept else 1 for a, n in enumerate(shape)])
