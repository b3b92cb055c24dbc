"""Trains the rounding of all weights of a block, by the error of the outputs of the block."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import Axes, QTensor, normalize_axes
from ..methods.internal import AdjustableRounding, Adjustments
from ..tree.internal import Plan

Block = Callable[[Any, Any], Any]
Pairs = Sequence[tuple[Any, Any]]
_All = dict[int, Adjustments]


@dataclasses.dataclass(frozen=True)
class BlockRounding:
    """AutoRound of a block: see `sequential`. Blocks of the same structure share a program.

    Attributes:
        block: (parameters, activations) -> activations, of QTensors too.
        iterations: number of steps.
        seed: of the order of the batches.
    """

    block: Block
    iterations: int
    seed: int

    def __call__(self, params: Any, quantized: Any, plans: Mapping[int, Plan], pairs: Pairs) -> Any:
        """The quantized parameters after training, or those given where they are better.

        Args:
            params: floating-point parameters of the block.
            quantized: the same with QTensors, to start from.
            plans: those of the QTensors, by the numbers of their leaves.
            pairs: activations of the quantized model, and outputs of the floating-point block, for
                each batch.
        """
        floats = jax.tree.leaves(params)
        leaves, treedef = jax.tree.flatten(quantized, is_leaf=_is_qtensor)
        roundings = {i: _rounding(floats[i], leaves[i], plan) for i, plan in plans.items()}
        rest = [None if i in plans else leaf for i, leaf in enumerate(leaves)]
        inputs = {i: leaves[i].inputs for i in plans}
        state = roundings, inputs, rest
        best, is_better = self._trained(state, treedef, pairs)
        if not is_better:
            return quantized
        for i in plans:
            q = dataclasses.replace(roundings[i].quantized(best[i]), inputs=inputs[i])
            leaves[i] = dataclasses.replace(q, dtype=leaves[i].dtype).reorder(leaves[i].order)
        return jax.tree.unflatten(treedef, leaves)

    def _trained(self, state: Any, treedef: Any, pairs: Pairs) -> tuple[_All, bool]:
        """The best adjustments, and whether they are better than none."""
        current = {i: rounding.initial() for i, rounding in state[0].items()}
        starts = [float(self._loss(current, state, treedef, *pair)) for pair in pairs]
        best, least = current, np.inf
        random = np.random.default_rng(self.seed)
        epochs = -(-self.iterations // len(pairs))
        order = np.concatenate([random.permutation(len(pairs)) for _ in range(epochs)])
        for i, batch in enumerate(order[: self.iterations]):
            rate = (1 - i / self.iterations) / self.iterations
            loss, following = self._step(current, state, treedef, *pairs[batch], rate)
            # Batches differ in difficulty, so each is compared with its own start.
            if starts[batch] > 0 and float(loss) / starts[batch] < least:
                best, least = current, float(loss) / starts[batch]
            current = following
        totals = [
            sum(float(self._loss(a, state, treedef, *pair)) for pair in pairs)
            for a in (best, current)
        ]
        found = current if totals[1] < totals[0] else best
        return found, min(totals) < sum(starts)

    @partial(jax.jit, static_argnames=("self", "treedef"))
    def _step(
        self, current: _All, state: Any, treedef: Any, x: Any, y: Any, rate: float
    ) -> tuple[jax.Array, _All]:
        """The loss, and the adjustments after a step."""
        loss, gradients = jax.value_and_grad(self._error)(current, state, treedef, x, y)
        return loss, {i: a.stepped(gradients[i], jnp.float32(rate)) for i, a in current.items()}

    @partial(jax.jit, static_argnames=("self", "treedef"))
    def _loss(self, current: _All, state: Any, treedef: Any, x: Any, y: Any) -> jax.Array:
        return self._error(current, state, treedef, x, y)

    def _error(self, adjustments: _All, state: Any, treedef: Any, x: Any, y: Any) -> jax.Array:
        """The squared error of the outputs of the block."""
        roundings, inputs, rest = state
        trained = {i: _trained_leaf(r, adjustments[i], inputs[i]) for i, r in roundings.items()}
        leaves = [trained.get(i, leaf) for i, leaf in enumerate(rest)]
        return squared_error(self.block(jax.tree.unflatten(treedef, leaves), x), y)


def squared_error(found: Any, wanted: Any) -> jax.Array:
    """The sum of squared differences of two trees of arrays."""

    def error(a, b):
        return jnp.sum(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)))

    errors = jax.tree.leaves(jax.tree.map(error, found, wanted))
    return jnp.sum(jnp.stack(errors))


def _is_qtensor(x: Any) -> bool:
    return isinstance(x, QTensor)


def _rounding(weight: jax.Array, q: QTensor, plan: Plan) -> AdjustableRounding:
    """The rounding of a weight as the QTensor holds it: divided by the multiplier."""
    wide = jnp.asarray(weight).astype(jnp.float32)
    if q.inputs is not None and q.inputs.rotation is not None:
        raise ValueError(
            f"Rounding of rotated weights cannot be trained; got {q!r} with a rotation. Leave out "
            "the rotation, or pass iterations=0."
        )
    if q.inputs is not None and q.inputs.multiplier is not None:
        wide = wide / _on_axes(q.inputs.multiplier, wide.ndim, plan.axis)
    return AdjustableRounding.of(wide, q.reorder(None), plan.scheme.weights)


def _on_axes(multiplier: jax.Array, ndim: int, axis: Axes) -> jax.Array:
    """A multiplier of stacked and contracted axes, with axes of length 1 for the outputs."""
    contracted = normalize_axes(axis, ndim)
    stacked = range(multiplier.ndim - len(contracted))
    new = [a for a in range(ndim) if a not in contracted and a not in stacked]
    return jnp.expand_dims(multiplier, new)


def _trained_leaf(
    rounding: AdjustableRounding, adjustments: Adjustments, inputs: Any
) -> jax.Array | QTensor:
    """A weight with gradients for its adjustments."""
    dtype = rounding.start.dtype
    values = rounding.values(adjustments).astype(dtype)
    if inputs is None:
        return values
    q = rounding.quantized(jax.lax.stop_gradient(adjustments))
    return dataclasses.replace(q, values=values, inputs=inputs, dtype=dtype)
