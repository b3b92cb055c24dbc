"""Trees of parameters that are quantized anew in each step of training."""

import dataclasses
import math
from typing import Any

import jax

from ..core import (
    ArrayConfig,
    Deferred,
    Inputs,
    MinMSE,
    QTensor,
    Range,
    quantize,
    scale_values,
)
from ..tree import Rules, select, stored_order
from .fake_quantize import LearnedRange, LearnedStep, quantize_for_training, scale_gradient


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Prepared(Deferred):
    """A weight in training: every operation sees it quantized, and it gets gradients. A pytree.

    Attributes:
        weight: the float array that is trained.
        learned: its step or range as parameters, trained too; None for those of `config.range`.
        inputs: how an operand that meets it in a product is treated first. A calibrated scale in
            it is trained as a learned step.
        config: how it is quantized, static.
        order: order in which its trailing axes are stored once it is quantized, static.
    """

    weight: jax.Array
    learned: LearnedStep | LearnedRange | None = None
    inputs: Inputs | None = None
    config: ArrayConfig = dataclasses.field(kw_only=True, metadata={"static": True})
    order: tuple[int, ...] | None = dataclasses.field(
        default=None, kw_only=True, metadata={"static": True}
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return self.weight.ndim

    @property
    def dtype(self) -> Any:
        """Dtype of the weight."""
        return self.weight.dtype

    def quantize(self) -> QTensor:
        """The weight as a QTensor whose `values` pass gradients on."""
        q = quantize_for_training(self.weight, self.config, self.learned)
        return dataclasses.replace(q, inputs=self._trained_inputs()).reorder(self.order)

    def _trained_inputs(self):
        inputs = self.inputs
        if inputs is None or inputs.config is None or inputs.scale is None:
            return inputs
        # As many features as share the step in one product (LSQ, section 2.2).
        axes = self.config.axes(self.ndim)
        features = max(1, math.prod(self.shape[a] for a in axes))
        factor = 1 / (features * inputs.config.bounds[1]) ** 0.5
        return dataclasses.replace(inputs, scale=scale_gradient(inputs.scale, factor))


def init_learned(params: Any, rules: Rules, range: Range | None = MinMSE()) -> Any:  # noqa: B008 (frozen)
    """The first steps and ranges to learn: those that quantization after training would take.

    Args:
        params: any pytree of float arrays.
        rules: as for `tree.quantize`.
        range: which part of each group they span; None for that of each config.

    Returns:
        A tree like params with a `LearnedStep` (symmetric) or `LearnedRange` (asymmetric) in place
        of each selected leaf, and None in place of others.

    Raises:
        ValueError: as for `tree.quantize`.

    Source: Bhalgat et al. 2020 (LSQ+), arXiv:2004.09576, section 3.2: the range with the least
        squared error.
    """
    _, leaves, chosen, treedef = select(params, rules)
    learned = [
        None if scheme is None else _first(leaf, scheme.weights, range)
        for leaf, scheme in zip(leaves, chosen, strict=True)
    ]
    return jax.tree.unflatten(treedef, learned)


def _first(leaf, config, range):
    q = quantize(leaf, dataclasses.replace(config, range=range or config.range))
    scale = scale_values(q.scale)
    if config.symmetric:
        return LearnedStep(scale)
    zero = 0 if q.zero_point is None else q.zero_point.astype(scale.dtype)
    qmin, qmax = config.bounds
    return LearnedRange((qmin - zero) * scale, (qmax - zero) * scale)


def prepare(params: Any, rules: Rules, learned: Any = None, *, platform: str | None = None) -> Any:
    """Puts selected leaves into the state in which training sees them quantized.

        forward:  what `jaxquant` computes with tree.quantize(params, rules)
        backward: gradients for the float weights, and for what is learned (see `fake_quantize`)

    The tree is a pytree of floats: differentiate with respect to it, give it to optax, save it.
    The same rules serve `tree.quantize`.

    Args:
        params: any pytree of float arrays.
        rules: as for `tree.quantize`; `inputs` of a scheme are quantized in training too.
        learned: tree from `init_learned` for the same leaves; None to take the range of each
            weight anew in each step.
        platform: "cpu", "gpu" or "tpu", where the converted tree will run; None for this one.

    Returns:
        The tree with a `Prepared` in place of each selected leaf.

    Raises:
        ValueError: as for `tree.quantize`, or something selected has nothing learned, or something
            learned is not selected.

    Error: none against `convert`: products are equal, bit for bit.
    """
    paths, leaves, chosen, treedef = select(params, rules)
    found = _by_path(learned)
    selected = {p for p, scheme in zip(paths, chosen, strict=True) if scheme is not None}
    if learned is not None and set(found) != selected:
        raise ValueError(
            f"learned must be for the leaves that the rules select, {sorted(selected)}; got "
            f"{sorted(found)}. Make it by init_learned(params, rules)."
        )
    prepared = [
        leaf
        if scheme is None
        else Prepared(
            leaf,
            found.get(path),
            None if scheme.inputs is None else Inputs(scheme.inputs),
            config=scheme.weights,
            order=stored_order(leaf, scheme.weights, platform),
        )
        for path, leaf, scheme in zip(paths, leaves, chosen, strict=True)
    ]
    return jax.tree.unflatten(treedef, prepared)


def convert(prepared: Any) -> Any:
    """The tree to serve: each `Prepared` as the QTensor that training saw.

    Args:
        prepared: tree from `prepare`, trained.

    Returns:
        The tree with a QTensor in place of each `Prepared`. Products with it are equal to those
        before, bit for bit.

    Raises:
        ValueError: the tree holds no `Prepared`.
    """
    if not any(map(_is_prepared, jax.tree.leaves(prepared, is_leaf=_is_prepared))):
        raise ValueError(
            f"convert takes a tree from prepare; got {jax.tree.structure(prepared)}, which holds "
            "no Prepared."
        )
    return jax.tree.map(
        lambda x: _convert(x) if _is_prepared(x) else x, prepared, is_leaf=_is_prepared
    )


@jax.jit
def _convert(prepared):
    return dataclasses.replace(prepared.quantize(), values=None)


def _is_prepared(x):
    return isinstance(x, Prepared)


def _is_learned(x):
    return isinstance(x, LearnedStep | LearnedRange)


def _by_path(learned):
    found = jax.tree_util.tree_flatten_with_path(learned, is_leaf=_is_learned)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in found}
