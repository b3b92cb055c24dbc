"""Custom layers that multiply with their own weights, made quantizable by lifting their call.

Examples are the experts of Mixtral in KerasHub. The class of such a layer stays a base of its
class, and its code runs as it is: a quantized weight reads as a variable whose value stands for
it, and `jaxquant.lift` computes what becomes of that value on codes.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from ...lift import lift
from .. import compat
from ..layer import QuantizableMixin, QuantizedWeight

# Arrays that stand for weights while a call is traced, by the id of their layer and their name.
_standing_in: ContextVar[Mapping[tuple[int, str], Any]] = ContextVar(
    "standing_in", default=MappingProxyType({})
)


class LiftedUse(NamedTuple):
    """How a layer uses one of its weights.

    Attributes:
        name: of the variable.
        axes: those that it contracts; of a table, those of a row.
        inputs: whether it multiplies activations with the weight.
        has_windows, in_groups: as for `QuantizedWeight`.
    """

    name: str
    axes: tuple[int, ...]
    inputs: bool
    has_windows: bool = False
    in_groups: bool = False


class LiftedWeight(QuantizedWeight):
    """A declared weight of a custom layer, which always reads as a variable.

    The code of the layer was written for one, and may read its `value` or `path`. While the call
    is traced, the value is the array that stands for the codes.
    """

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        found = _standing_in.get().get((id(layer), self.name))
        found = super().__get__(layer, owner) if found is None else found
        return compat.GivenVariable(found, self.name) if isinstance(found, jax.Array) else found


class LiftedMixin(QuantizableMixin):
    """A custom layer whose call is lifted once its weights are quantized."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the layer's class, on codes where they are multiplied."""
        call = super().call
        if not self.stored_weights or (kwargs.get("training") and _changes_state(self)):
            return call(*args, **kwargs)

        def run(weights, args, kwargs):
            with _replaced(self, weights):
                return call(*args, **kwargs)

        weights = {name: self.operand(name) for name in self.stored_weights}
        return lift(run)(weights, args, kwargs)


@contextlib.contextmanager
def _replaced(layer: Any, weights: Mapping[str, Any]) -> Iterator[None]:
    own = {(id(layer), name): value for name, value in weights.items()}
    token = _standing_in.set({**_standing_in.get(), **own})
    try:
        yield
    finally:
        _standing_in.reset(token)


def _changes_state(layer: Any) -> bool:
    """Whether training changes variables: their new values would not leave the traced call."""
    layers = compat.sublayers(layer)
    held = {
        id(v)
        for x in layers
        if isinstance(x, QuantizableMixin)
        for weight in x.stored_weights.values()
        for v in weight.variables
    }
    own = [v for x in layers for v in compat.own_variables(x) if not v.trainable]
    return any(compat.seeds(x) for x in layers) or any(id(v) not in held for v in own)


def lifted_weights(uses: tuple[LiftedUse, ...]) -> dict[str, LiftedWeight]:
    """The declarations of weights that are used in these ways."""
    return {
        use.name: LiftedWeight(
            use.axes, use.inputs, has_windows=use.has_windows, in_groups=use.in_groups
        )
        for use in uses
    }


def why_not_lifted(layer: Any, uses: tuple[LiftedUse, ...]) -> str | None:
    """Why a layer cannot be lifted, or None."""
    names = [v.name for v in compat.own_variables(layer)]
    doubled = [use.name for use in uses if names.count(use.name) > 1]
    if doubled:
        return f"it has several variables named {doubled[0]!r}"
    # A property, such as that of `keras.layers.Dense`, reads the variable.
    beside = [getattr(type(layer), use.name, property()) for use in uses]
    taken = [use for use, x in zip(uses, beside, strict=True) if not isinstance(x, property)]
    if taken:
        return f"its class has an attribute {taken[0].name!r} beside the variable of that name"
    values = list(compat.attributes(layer).values())
    kept = {v.name: v for v in compat.own_variables(layer)}
    hidden = [use.name for use in uses if not any(kept[use.name] is x for x in values)]
    if hidden:
        return f"it does not keep the variable {hidden[0]!r} as an attribute"
    return None


def lifts_in(layer: Any) -> dict[str, list[list[Any]]]:
    """How lifted layers use their weights, by their places among the sublayers; as JSON values."""
    return {
        str(place): [
            [w.name, list(w.axes(inner)), w.inputs, w.has_windows, w.in_groups]
            for w in inner.declared_weights.values()
        ]
        for place, inner in enumerate(compat.sublayers(layer))
        if isinstance(inner, LiftedMixin)
    }


def uses_in(found: list[list[Any]]) -> tuple[LiftedUse, ...]:
    """Undoes the JSON of `lifts_in` for one layer."""
    return tuple(LiftedUse(name, tuple(axes), *rest) for name, axes, *rest in found)
