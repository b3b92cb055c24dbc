"""Trains the scales of a quantized model against the outputs of the float model."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import QTensor, bits_of
from ..lift import lift
from ..tree import Progress, Rule, is_quantized
from ..tree.internal import leaves_with_paths, progress_bar

Loss = Callable[[Any, Any], jax.Array]


def divergence(found: jax.Array, exact: jax.Array) -> jax.Array:
    """Mean Kullback-Leibler divergence of logits from those of the float model, in nats.

        mean over rows of sum over v of p_v (log p_v - log q_v),    p = softmax(exact)

    Args:
        found, exact: (..., V).

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
        >>> round(float(jq.tuning.divergence(logits[:1], logits[1:])), 4)
        0.3681
    """
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (exact, found))
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))


def distill(
    apply: Callable[[Any, Any], Any],
    params: Any,
    quantized: Any,
    batches: Sequence[Any],
    optimizer: Any,
    *,
    also: str | Sequence[str] = (),
    loss: Loss = divergence,
    epochs: int = 1,
    progress: Progress | bool | None = None,
) -> Any:
    """Trains the scales and offsets of a quantized tree, and leaves its codes as they are.

        minimizes mean over batches of loss(apply(q, batch), apply(params, batch)) over f, f', g,
        q = (codes - zero_point) * scale * f + offset * f',    b = b_0 + rms(b_0) (g - 1)

    The last step after `tree.quantize`, for any method and format with scales of 16 bits or more.
    Factors are float32 and start at 1; scales are rounded to their stored dtype in every step.
    Norms and biases, if `also` names them, undo what the errors of quantization shift on average.

    Args:
        apply: (params, batch) -> outputs; any function that `jaxquant.lift` transforms.
        params: the float tree.
        quantized: the same tree, quantized.
        batches: arguments of apply, in the order of training.
        optimizer: of the factors, such as `optax.adam(1e-3)`; its updates are relative changes.
        also: patterns of floating-point leaves b to train, as in `Rule`: such as "*/bias". Their
            changes are relative to the root mean square of the leaf; zeros change by the updates.
        loss: (outputs, outputs of the float model) -> scalar.
        epochs: passes over the batches.
        progress: as for `tree.quantize`, per epoch, with the mean loss.

    Returns:
        The quantized tree with other scales.

    Raises:
        ValueError: there are no batches or no scales to train, epochs is not positive, or a pattern
            matches no floating-point leaf.

    Guarantee: the mean loss over the batches is not larger than before, because the best epoch is
        kept.
    Source: Chen et al. 2024 (EfficientQAT), arXiv:2407.11062, section 3.3; for norms, Li et al.
        2023 (Norm Tweaking), arXiv:2309.02784.

    Example:
        >>> import optax
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
        >>> def apply(params, x):
        ...     return x @ params["kernel"]
        >>> q = jq.tree.quantize(params, jq.ArrayConfig(format=jq.INT4, group_size=8))
        >>> batches = [jax.random.normal(jax.random.key(1), (32, 16))]
        >>> tuned = jq.tuning.distill(apply, params, q, batches, optax.adam(1e-2), epochs=5)
        >>> exact = apply(params, batches[0])
        >>> before, after = (
        ...     jq.tuning.divergence(jq.lift(apply)(tree, batches[0]), exact) for tree in (q, tuned)
        ... )
        >>> bool(after < before)
        True
    """
    if not batches or epochs < 1:
        raise ValueError(
            "distill needs batches and a positive number of epochs; got "
            f"{len(batches)} batches and epochs={epochs}."
        )
    paths, leaves, treedef = leaves_with_paths(quantized)
    factors = {i: found for i, leaf in enumerate(leaves) if (found := _factors(leaf))}
    if not factors:
        raise ValueError(
            "distill needs QTensors with scales of 16 bits or more; got "
            f"{sum(map(is_quantized, leaves))} quantized leaves without. Choose another "
            "scale_dtype."
        )
    factors |= _floats(also, paths, leaves)
    lifted = lift(apply)

    def loss_of(factors: Any, fixed: Any, batch: Any) -> jax.Array:
        leaves, params = fixed
        exact = jax.lax.stop_gradient(lifted(params, batch))
        tree = treedef.unflatten(_all_scaled(leaves, factors))
        return loss(lifted(tree, batch), exact)

    with progress_bar(progress, epochs, "Distilling") as report:
        fixed = (leaves, params)
        best = _best_epoch(loss_of, factors, fixed, batches, optimizer, epochs, report)
    return treedef.unflatten(_all_scaled(leaves, best))


def _best_epoch(
    loss_of: Callable[[Any, Any, Any], jax.Array],
    factors: Any,
    fixed: Any,
    batches: Sequence[Any],
    optimizer: Any,
    epochs: int,
    report: Progress,
) -> Any:
    """The factors after the epoch with the least mean loss, or those at the start."""

    @jax.jit
    def step(factors: Any, state: Any, fixed: Any, batch: Any) -> Any:
        gradients = jax.grad(loss_of)(factors, fixed, batch)
        updates, state = optimizer.update(gradients, state, factors)
        return jax.tree.map(jnp.add, factors, updates), state

    evaluate = jax.jit(loss_of)

    def mean_loss(factors: Any) -> float:
        return float(np.mean([evaluate(factors, fixed, batch) for batch in batches]))

    state, best, least = optimizer.init(factors), factors, mean_loss(factors)
    for epoch in range(1, epochs + 1):
        for batch in batches:
            factors, state = step(factors, state, fixed, batch)
        found = mean_loss(factors)
        if found < least:
            least, best = found, factors
        report(epoch, epochs, f"loss {found:.3g}")
    return best


def _factors(leaf: Any) -> dict[str, jax.Array]:
    """Factors of 1 for what is trained of a leaf."""
    if not isinstance(leaf, QTensor):
        return {}
    parts = {"scale": leaf.scale, "offset": leaf.offset}
    return {
        name: jnp.ones(x.shape, jnp.float32)
        for name, x in parts.items()
        if isinstance(x, jax.Array | np.ndarray) and bits_of(x.dtype) >= 16
    }


def _floats(
    patterns: str | Sequence[str], paths: list[str], leaves: list[Any]
) -> dict[int, dict[str, jax.Array]]:
    """Factors of 1 for the floating-point leaves that the patterns match."""
    floats = [(i, path) for i, path in enumerate(paths) if _is_float(leaves[i])]
    found = {}
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        rule = Rule(pattern, None)
        new = [i for i, path in floats if rule.matches(path, leaves[i])]
        if not new:
            names = ", ".join([path for _, path in floats][:8])
            raise ValueError(
                f"also={pattern!r} matches no floating-point leaf; those are {names or 'none'}. "
                "Patterns are globs over the whole path, as in Rule."
            )
        found |= {i: {"array": jnp.ones(leaves[i].shape, jnp.float32)} for i in new}
    return found


def _is_float(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array | np.ndarray)
    return is_array and jnp.issubdtype(leaf.dtype, jnp.floating)


def _all_scaled(leaves: list[Any], factors: dict[int, dict[str, jax.Array]]) -> list[Any]:
    """Leaves with their scales and offsets times the factors, which some of them have."""
    return [_scaled(x, factors[i]) if i in factors else x for i, x in enumerate(leaves)]


def _scaled(q: Any, factors: dict[str, jax.Array]) -> Any:
    """The array with its scales times the factors, in their stored dtype; or a float array."""
    if not isinstance(q, QTensor):
        wide = q.astype(jnp.promote_types(q.dtype, jnp.float32))
        unit = jnp.sqrt(jnp.mean(jnp.square(wide)))
        change = (factors["array"] - 1).astype(wide.dtype) * jnp.where(unit > 0, unit, 1)
        return (wide + change).astype(q.dtype)
    parts = {}
    for name, factor in factors.items():
        x: Any = getattr(q, name)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        parts[name] = (wide * factor.astype(wide.dtype)).astype(x.dtype)
    return dataclasses.replace(q, **parts)
