"""Reads the parameters of JAX's primitives, in each supported version of JAX."""

import itertools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
from jax.extend.core import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Primitive,
    Var,
    jaxprs_in_params,
)
from jax.extend.core.primitives import broadcast_in_dim_p, cond_p, scan_p, while_p

# jaxquant itself, packages installed beside JAX, and Python's own modules.
_LIBRARIES = tuple(
    f"{folder}{os.sep}"
    for folder in (
        pathlib.Path(__file__).parents[1],
        pathlib.Path(jax.__file__).parents[1],
        pathlib.Path(os.__file__).parent,
    )
)

Params = Mapping[str, Any]


class Inner(NamedTuple):
    """A jaxpr inside of an equation, such as the body of a loop.

    Attributes:
        jaxpr: the open jaxpr.
        operands: for each input of the jaxpr, the equation's operand that it equals, is a slice
            of, or starts from; None if unknown.
        times: how often it runs for one run of the equation; None if that is not known.
    """

    jaxpr: Jaxpr
    operands: Sequence[Var | Literal | None]
    times: int | None


def inner_jaxprs(eqn: JaxprEqn) -> list[Inner]:
    """The jaxprs inside of an equation, those of custom derivatives left out."""
    return READERS.get(eqn.primitive, _read_call)(eqn)


def count_before_slices(eqn: JaxprEqn) -> int:
    """How many operands of a loop over slices come before the arrays that it slices.

    All of them, for equations that are not loops over slices.
    """
    if eqn.primitive is not scan_p:
        return len(eqn.invars)
    return sum(scan_counts(eqn.params))


def scan_counts(params: Params) -> tuple[int, int]:
    """How many operands of a `scan` are constants, and how many are carried; the rest is sliced."""
    if "ft_in" in params:  # From JAX 0.11 on.
        constants, carried, _ = params["ft_in"].unpack()
        return len(constants), len(carried)
    return params["num_consts"], params["num_carry"]


def carried_operands(eqn: JaxprEqn) -> range:
    """The places of the operands that a loop starts from, in the order of its first results."""
    if eqn.primitive is scan_p:
        constants, carried = scan_counts(eqn.params)
        return range(constants, constants + carried)
    if eqn.primitive is while_p:
        return range(sum(while_counts(eqn.params)), len(eqn.invars))
    return range(0)


def scan_options(params: Params) -> dict[str, Any]:
    """The parameters of a `scan` that are arguments of `jax.lax.scan`."""
    return {name: params[name] for name in ("length", "reverse", "unroll")}


def called_program(params: Params) -> Any:
    """The program that a call, a checkpoint, a `scan` or a `shard_map` runs on its operands.

    Returns a jaxpr with its constants, or None for a primitive of `jax.experimental.hijax` that
    cannot be expanded into one.
    """
    if "_prim" in params:
        return _program_of_type(params["_prim"])
    return closed(next(params[name] for name in _PROGRAMS if name in params))


def closed(program: Any) -> ClosedJaxpr:
    """The program with its constants; an open jaxpr of an equation does not have any."""
    return program if hasattr(program, "jaxpr") else ClosedJaxpr(program, ())


def while_counts(params: Params) -> tuple[int, int]:
    """How many operands of a `while` are constants of its condition, and how many of its body."""
    return params["cond_nconsts"], params["body_nconsts"]


def remat_options(params: Params) -> dict[str, Any] | None:
    """The parameters of a rematerialized call that are arguments of `jax.checkpoint`.

    None for a primitive of `jax.experimental.hijax` that is not a checkpoint.
    """
    found = vars(params["_prim"]) if "_prim" in params else params
    if "policy" not in found:
        return None
    return {"prevent_cse": found.get("prevent_cse", True), "policy": found["policy"]}


def shard_map_options(params: Params) -> dict[str, Any]:
    """The parameters of a `shard_map` that are arguments of `jax.shard_map`, without specs."""
    return {
        "mesh": params["mesh"],
        "axis_names": set(params["newly_manual_axes"]),
        "check_vma": params["check_vma"],
    }


def call_shardings(eqn: JaxprEqn) -> tuple[list[jax.sharding.Sharding | None], ...]:
    """The shardings that a jitted function sets for operands and results; None for no sharding."""
    places = (("in_shardings", eqn.invars), ("out_shardings", eqn.outvars))
    found = (eqn.params.get(name, [None] * len(atoms)) for name, atoms in places)
    return tuple(
        [s if isinstance(s, jax.sharding.Sharding) else None for s in those] for those in found
    )


def broadcast_axes(eqn: JaxprEqn) -> tuple[int, ...] | None:
    """For each axis of the operand of a broadcast, that of the result; None for other equations."""
    is_broadcast = eqn.primitive is broadcast_in_dim_p
    return eqn.params["broadcast_dimensions"] if is_broadcast else None


def branch_for(params: Params, platform: str) -> int | None:
    """Place of the branch of a `cond` that a platform runs; None if a value decides.

    `jax.lax.platform_dependent` makes a `cond` whose branches are for platforms.
    """
    platforms = params.get("branches_platforms")
    if platforms is None:
        return None
    is_listed = [names is not None and platform in names for names in platforms]
    return is_listed.index(True) if any(is_listed) else platforms.index(None)


def checkpoint_name_of(params: Params) -> str | None:
    """The name that a hijax primitive gives to an array; None if it does something else."""
    high = params["_prim"]
    return high.name if type(high).__name__ in _NAMING else None


def jit_name(eqn: JaxprEqn) -> str | None:
    """Name of the function if the equation calls a jitted one, else None."""
    return eqn.params["name"] if "in_shardings" in eqn.params else None


def name_stack(eqn: JaxprEqn) -> str:
    """The `jax.named_scope`s and transformations around an equation, without outer jaxprs'."""
    return str(eqn.source_info.name_stack)


def user_line(eqn: JaxprEqn) -> str:
    """ "file:line" of the innermost Python call outside of libraries that made an equation.

    Empty if all are inside of libraries.
    """
    return line_of(eqn.source_info.traceback)


def line_of(traceback: Any) -> str:
    """`user_line` of JAX's traceback, which may be None."""
    found = [] if traceback is None else traceback.frames
    lines = (f"{f.file_name}:{f.line_num}" for f in found if not f.file_name.startswith(_LIBRARIES))
    return next(lines, "")


def is_tracer(x: Any) -> bool:
    """Whether `x` stands for an array while a function is traced."""
    return isinstance(x, jax.core.Tracer)


def has_references(eqn: JaxprEqn) -> bool:
    """Whether an operand is a mutable reference (`jax.new_ref`), or anything but an array."""
    return not all(isinstance(v.aval, jax.core.ShapedArray) for v in eqn.invars)


def with_equations(program: ClosedJaxpr, eqns: Sequence[JaxprEqn]) -> ClosedJaxpr:
    """The program with other equations between the same inputs and outputs."""
    return ClosedJaxpr(program.jaxpr.replace(eqns=list(eqns)), program.consts)


def _read_scan(eqn):
    return [Inner(_open(eqn.params["jaxpr"]), eqn.invars, eqn.params["length"])]


def _read_while(eqn):
    counts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    first, second = itertools.accumulate(counts)
    operands = eqn.invars
    condition = [*operands[:first], *operands[second:]]
    return [
        Inner(_open(eqn.params["cond_jaxpr"]), condition, None),
        Inner(_open(eqn.params["body_jaxpr"]), operands[first:], None),
    ]


def _read_cond(eqn):
    return [Inner(_open(branch), eqn.invars[1:], 1) for branch in eqn.params["branches"]]


def _read_call(eqn):
    """Of an equation that passes its operands to a jaxpr; otherwise the operands are unknown."""
    return [Inner(jaxpr, _passed(eqn, jaxpr), 1) for jaxpr in map(_open, _jaxprs(eqn.params))]


def _jaxprs(params):
    yield from jaxprs_in_params(params)
    program = called_program(params) if "_prim" in params else None
    if program is not None:
        yield program


def _program_of_type(high):
    """The program of a primitive of `jax.experimental.hijax`; None without one on arrays.

    JAX uses such primitives with `jax_custom_vjp3`, `jax_custom_jvp3` and `jax_remat3`.
    """
    avals = high.in_avals_flat
    # The jaxpr of another primitive may be only a part of it, such as the body of a loop.
    holder = high if hasattr(high, "policy") else getattr(high, "traced", None)
    if holder is not None and len(holder.jaxpr.in_avals) == len(avals):
        return closed(holder.jaxpr)
    if not all(isinstance(aval, jax.core.ShapedArray) for aval in avals):
        return None

    def expanded(*operands):
        return jax.tree.leaves(high.expand(*jax.tree.unflatten(high.in_tree, operands)))

    try:
        return jax.make_jaxpr(expanded)(*avals)
    except NotImplementedError:  # It is lowered in another way.
        return None


def _passed(eqn, jaxpr):
    is_passed = len(eqn.invars) == len(jaxpr.invars)
    return eqn.invars if is_passed else [None] * len(jaxpr.invars)


def _open(jaxpr):
    return getattr(jaxpr, "jaxpr", jaxpr)


# The parameters that hold the program of a primitive that has one.
_PROGRAMS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# Types of hijax primitives that only name an array.
_NAMING = frozenset({"CheckpointName"})
# Of primitives that do not pass all their operands to a jaxpr that they run once.
READERS: dict[Primitive, Callable[[JaxprEqn], list[Inner]]] = {
    scan_p: _read_scan,
    while_p: _read_while,
    cond_p: _read_cond,
}


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of a tree that JAX can trace, and a function that puts others in their place.

    Others are the functions and names among the leaves of a model that is a pytree.
    """
    leaves, treedef = jax.tree.flatten(tree)
    is_array = [_is_traceable(x) for x in leaves]

    def whole(arrays: list[Any]) -> Any:
        given = iter(arrays)
        pairs = zip(leaves, is_array, strict=True)
        return jax.tree.unflatten(treedef, [next(given) if b else x for x, b in pairs])

    return [x for x, b in zip(leaves, is_array, strict=True) if b], whole


def _is_traceable(x):
    is_array = hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, type)
    return is_array or isinstance(x, bool | int | float | complex)
