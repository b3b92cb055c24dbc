"""The walk that finds how a program uses its parameters."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from ..jaxprs import Literal, count_before_slices, inner_jaxprs, live_equations, user_line
from .data_flow import after_steps, are_in, dependent_variables, inner_flags
from .views import View


@dataclasses.dataclass(frozen=True)
class Use:
    """One operation that a parameter is an operand of.

    Attributes:
        kind: "product", "convolution", "lookup", or "other".
        primitive: name of JAX's primitive.
        contracted: axes of the parameter that are summed over.
        batched: axes along which each slice has its own operand, such as experts.
        looked_up: axes that indices select from.
        stacked: axes that a loop slices.
        line: file and line of the innermost call that is not in a library; empty if all are.
        is_joined: whether several contracted axes are one axis of an operand, after a reshape.
        activations: identifies the other operand; parameters with equal ones share activations.
        window: axes of the kernel of a convolution that are the pixels of its windows.
        groups: into how many groups a convolution splits its channels, or its images.

    Example:
        >>> found = jq.uses(lambda w, x: x @ w.T, jnp.ones((4, 8)), jnp.ones((2, 8)))
        >>> (use,) = found.by_path[""]
        >>> use.kind, use.primitive, use.contracted
        ('product', 'dot_general', (1,))
    """

    kind: str
    primitive: str
    contracted: tuple[int, ...] = ()
    batched: tuple[int, ...] = ()
    looked_up: tuple[int, ...] = ()
    stacked: tuple[int, ...] = ()
    line: str = ""
    is_joined: bool = False
    activations: Hashable = None
    window: tuple[int, ...] = ()
    groups: int = 1


Found = list[tuple[str, Use]]
# The parameters that a variable is a view of; several if they were joined.
Views = tuple[View, ...]


class Walk:
    """Collects the uses of parameters in a program.

    Attributes:
        found: (path, use) in the order of the program.
    """

    def __init__(self):
        self.found: Found = []
        self._data = set()

    def program(
        self,
        jaxpr: Any,
        views: Sequence[Views],
        names: Sequence[Hashable],
        is_data: Sequence[bool],
    ) -> list[Views]:
        """Walks a jaxpr; returns the views that its results are.

        Args:
            jaxpr: an open jaxpr.
            views: those of each input.
            names: identifies each input.
            is_data: whether each input depends on an argument.
        """
        data = dependent_variables(jaxpr, is_data)
        known = dict(zip(jaxpr.invars, views, strict=True))
        same = dict(zip(jaxpr.invars, names, strict=True))
        for eqn in live_equations(jaxpr):
            operands = [_views(known, v) for v in eqn.invars]
            labels = [_name(same, v) for v in eqn.invars]
            self._data = data
            if any(operands) or inner_jaxprs(eqn):
                results = self.equation(eqn, operands, labels)
                known.update((v, x) for v, x in zip(eqn.outvars, results, strict=True) if x)
            if eqn.primitive.name in _SAME and len(eqn.invars) == 1:
                shape: Any = getattr(eqn.outvars[0].aval, "shape", None)
                same[eqn.outvars[0]] = (eqn.primitive.name, shape, str(eqn.params), labels[0])
        return [_views(known, v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, operands: Sequence[Views], labels: Sequence[Any]) -> list[Views]:
        """Walks one equation; returns the views that its results are."""
        inner = inner_jaxprs(eqn)
        if inner:
            return self._inner(eqn, inner, operands, labels)
        rule = _RULES.get(eqn.primitive.name, _other)
        return rule(self, eqn, operands, labels)

    def add(self, view: View, eqn: Any, kind: str, **facts: Any) -> None:
        """Adds a use of the parameter that a view shows."""
        stacked = tuple(sorted(view.stacked))
        name, line = eqn.primitive.name, user_line(eqn)
        self.found.append((view.path, Use(kind, name, stacked=stacked, line=line, **facts)))

    def are_data(self, atoms: Sequence[Any]) -> list[bool]:
        """Whether each operand of the equation that is walked depends on an argument."""
        return are_in(self._data, atoms)

    def _inner(self, eqn, inner, operands, labels):
        flags = after_steps(eqn, self.are_data(eqn.invars))
        known = dict(zip(map(id, eqn.invars), zip(operands, labels, strict=True), strict=True))
        first_slice, results = count_before_slices(eqn), []
        sliced = {id(v) for v in eqn.invars[first_slice:]}
        for each in inner:
            views, names = [], []
            for v in each.operands:
                found, name = ((), None) if v is None else known.get(id(v), ((), None))
                is_slice = v is not None and id(v) in sliced
                views.append(tuple(x.without(0) for x in found) if is_slice else found)
                names.append(("slice", name) if is_slice else name if name is not None else v)
            is_data = inner_flags(eqn, each, flags)
            results.append(self.program(each.jaxpr, views, names, is_data))
        is_call = len(inner) == 1 and first_slice == len(eqn.invars)
        if is_call and len(results[0]) == len(eqn.outvars):
            return results[0]
        return [()] * len(eqn.outvars)


def _views(known, atom) -> Views:
    return () if isinstance(atom, Literal) else known.get(atom, ())


def _name(same, atom) -> Hashable:
    return None if isinstance(atom, Literal) else same.get(atom, atom)


def _other(walk, eqn, operands, labels):
    for views in operands:
        for view in views:
            walk.add(view, eqn, "other")
    return [()] * len(eqn.outvars)


def _contracted(view, axes):
    is_joined = any(len(view.named([a])) > 1 for a in axes)
    return {"contracted": view.named(axes), "is_joined": is_joined}


def _dot_general(walk, eqn, operands, labels):
    contract, batch = eqn.params["dimension_numbers"]
    for side, views in enumerate(operands):
        for view in views:
            walk.add(
                view,
                eqn,
                "product",
                **_contracted(view, contract[side]),
                batched=view.named(batch[side]),
                activations=labels[1 - side],
            )
    return [()]


def _ragged_dot(walk, eqn, operands, labels):
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contract), _ = numbers.dot_dimension_numbers
    for view in operands[1]:
        batched = view.named(numbers.rhs_group_dimensions)
        facts = _contracted(view, contract)
        walk.add(view, eqn, "product", **facts, batched=batched, activations=labels[0])
    return _other(walk, eqn, [operands[0], (), *operands[2:]], labels)


def _convolution(walk, eqn, operands, labels):
    kernel = eqn.params["dimension_numbers"].rhs_spec
    groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
    for view in operands[1]:
        facts = _contracted(view, kernel[1:])
        facts |= {"window": view.named(kernel[2:]), "groups": groups}
        walk.add(view, eqn, "convolution", **facts, activations=labels[0])
    return _other(walk, eqn, [operands[0], ()], labels)


def _gather(walk, eqn, operands, labels):
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    for view in operands[0]:
        axes = [a for a in numbers.start_index_map if sizes[a] != shape[a]]
        if len(axes) == 1 and sizes[axes[0]] == 1:
            walk.add(view, eqn, "lookup", looked_up=view.named(axes))
        else:
            walk.add(view, eqn, "other")
    return _other(walk, eqn, [(), *operands[1:]], labels)


def _dynamic_slice(walk, eqn, operands, labels):
    """One row of a table, at an index that depends on an argument; or a part of an array."""
    shape, sizes = _shapes(eqn)
    cut = [a for a in range(len(shape)) if sizes[a] != shape[a]]
    is_row = len(shape) == 2 and len(cut) == 1 and sizes[cut[0]] == 1
    if not is_row or not any(walk.are_data(eqn.invars[1 + cut[0] : 2 + cut[0]])):
        return _sliced(walk, eqn, operands, labels)
    for view in operands[0]:
        walk.add(view, eqn, "lookup", looked_up=view.named(cut))
    return _other(walk, eqn, [(), *operands[1:]], labels)


def _shapes(eqn):
    return eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape


def _view_rule(change: Callable[[View, Any], View | None]):
    """The rule of an operation on views: other uses where a view does not exist any more."""

    def rule(walk, eqn, operands, labels):
        changed = []
        for view in operands[0]:
            new = change(view, eqn)
            if new is None:
                walk.add(view, eqn, "other")
            else:
                changed.append(new)
        _other(walk, eqn, [(), *operands[1:]], labels)
        return [tuple(changed)] * len(eqn.outvars)

    return rule


def _joined(walk, eqn, operands, labels):
    """All operands together are the result of a concatenation."""
    before = [v.aval.shape for v in eqn.invars]
    after = eqn.outvars[0].aval.shape
    joined = []
    for views, shape in zip(operands, before, strict=True):
        if len(shape) != len(after):
            axis = eqn.params["axis"]
            places = [a for a in range(len(after)) if a != axis]
            views = [view.broadcast(_with_one(after, axis), places) for view in views]
        joined += views
    return [tuple(joined)]


def _with_one(shape, axis):
    return (*shape[:axis], 1, *shape[axis + 1 :])


def _scaled(walk, eqn, operands, labels):
    """A product with a number, or with one per block: a scaled parameter."""
    (lhs, rhs), results = operands, []
    shape = eqn.outvars[0].aval.shape
    for views, own, other in ((lhs, 0, 1), (rhs, 1, 0)):
        is_kept = eqn.invars[own].aval.shape == shape and not operands[other]
        is_scale = eqn.invars[other].aval.size < max(eqn.invars[own].aval.size, 2)
        is_scale |= isinstance(labels[other], tuple) and labels[other][0] == "broadcast_in_dim"
        for view in views:
            if is_kept and is_scale and not view.is_broadcast and len(shape) > 1:
                results.append(view)
            else:
                walk.add(view, eqn, "other")
    return [tuple(results)]


def _unstack(walk, eqn, operands, labels):
    parts = tuple(view.without(eqn.params["axis"]) for view in operands[0])
    return [parts] * len(eqn.outvars)


def _each(walk, eqn, operands, labels):
    return list(operands)


_sliced = _view_rule(lambda view, eqn: view.resize(*_shapes(eqn)))
_same_shape = _view_rule(lambda view, eqn: view)
_reshape = _view_rule(lambda view, eqn: view.reshape(*_shapes(eqn)))
_RULES: Mapping[str, Callable[..., list[Views]]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "transpose": _view_rule(lambda view, eqn: view.transpose(eqn.params["permutation"])),
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _view_rule(
        lambda view, eqn: view.broadcast(
            eqn.outvars[0].aval.shape, eqn.params["broadcast_dimensions"]
        )
    ),
    "slice": _sliced,
    "dynamic_slice": _dynamic_slice,
    "split": lambda walk, eqn, operands, labels: [
        tuple(v.resize(eqn.invars[0].aval.shape, out.aval.shape) for v in operands[0])
        for out in eqn.outvars
    ],
    "unstack": _unstack,
    "concatenate": _joined,
    "stack": _joined,
    "convert_element_type": _same_shape,
    "mul": _scaled,
    "div": _scaled,
    "neg": _same_shape,
    "rev": _same_shape,
    "copy": _same_shape,
    "copy_p": _same_shape,
    "stop_gradient": _same_shape,
    "name": _same_shape,
    "pvary": _same_shape,
    "sharding_constraint": _same_shape,
    "reshard": _same_shape,
    "optimization_barrier": _each,
}
# Operations after which activations are the same activations to whatever is multiplied by them.
_SAME = frozenset({"convert_element_type", "reshape", "squeeze", "broadcast_in_dim", "transpose"})
_SAME |= {"copy", "stop_gradient", "name", "sharding_constraint", "reshard"}


def find_uses(program: Any, views: Sequence[View | None]) -> Found:
    """How a program uses its parameters.

    Args:
        program: a jaxpr with its constants.
        views: for each input, the whole parameter that it is, or None.
    """
    walk = Walk()
    given = [() if view is None else (view,) for view in views]
    inputs = list(program.jaxpr.invars)
    walk.program(program.jaxpr, given, inputs, [True] * len(inputs))
    return walk.found
