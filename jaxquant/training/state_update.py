"""An update of a quantized state that has a part of it in float at a time."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..core import ArrayConfig, Seed
from ..jaxprs import elementwise_parts, is_tracer, remaining_program, run_program
from ..kernels import cpu
from .blockwise import Blockwise
from .state_parts import StatePart, is_stored_alike, is_supported

# Elements of the parts that are computed at a time: each has some float32 arrays in memory.
_TOGETHER = 2**18

# (gradients, state in float, other arguments) -> (updates, state in float).
Update = Callable[[Any, Any, Any], tuple[Any, Any]]
# State in float, perhaps of abstract arrays -> the config that each array is stored with, or None.
Select = Callable[[Any], Sequence[ArrayConfig | None]]


def update_in_parts(
    update: Update,
    given: tuple[Any, Any, Any],
    select: Select,
    seeds: Sequence[Seed] | None,
) -> tuple[Any, Any, dict[int, Blockwise]] | None:
    """`update` of a quantized state, in parts that are decoded, computed and encoded by themselves.

    A part consists of those arrays of the new state and updates of which each element depends on
    the same element of some arrays of the old state, and otherwise on other arrays and scalars.
    A native kernel computes it row by row, such that what is in between stays in the cache; XLA
    computes what is in no part or has other operations than the kernel, and everything in programs
    that are not for one CPU.

    Args:
        update: the function.
        given: its arguments, with `Blockwise` arrays in the state.
        select: which arrays of the new state are quantized.
        seeds: of their noise, one per array of the state; None rounds to nearest.

    Returns:
        The updates; the new state, in which arrays that are quantized already are abstract; and
        these, by their number among the arrays of the state. None if there are no parts, or
        outside of traced functions.
    """
    leaves, structure = jax.tree.flatten(given, is_leaf=_is_stored)
    places = [i for i, x in enumerate(leaves) if isinstance(x, Blockwise | jax.Array)]
    arrays = [_bare(leaves[i]) for i in places]
    if cpu.unavailable() is not None or not any(map(is_tracer, jax.tree.leaves(arrays))):
        return None

    def flat(*values):
        filled = list(leaves)
        for place, x in zip(places, values, strict=True):
            filled[place] = _in_box_of(leaves[place], x)
        return update(*jax.tree.unflatten(structure, filled))

    program, shapes = jax.make_jaxpr(flat, return_shape=True)(*map(_abstract, arrays))
    first = len(jax.tree.leaves(shapes[0]))
    before = jax.tree.map(_in_box_of, given[1], is_leaf=_is_stored)
    if jax.tree.structure(before) != jax.tree.structure(shapes[1]):
        return None
    # The state is after the gradients among the leaves, and after the updates among the results.
    moved = first - len(jax.tree.leaves(given[0]))
    replaced = {n: place + moved for n, place in enumerate(places) if _is_stored(leaves[place])}
    configs = dict(enumerate(select(shapes[1]), first))
    parts = _parts(program, arrays, replaced, configs)
    if not parts:
        return None
    of_results = {} if seeds is None else dict(enumerate(seeds, first))
    done = _results(program, parts, arrays, of_results)
    found, tree = jax.tree.flatten(shapes)
    filled = [x if _is_stored(done[i]) else done[i] for i, x in enumerate(found)]
    ready = {i - first: x for i, x in done.items() if _is_stored(x)}
    return *jax.tree.unflatten(tree, filled), ready


def _parts(
    program: Any,
    arrays: Sequence[Any],
    replaced: Mapping[int, int],
    configs: Mapping[int, ArrayConfig | None],
) -> list[StatePart]:
    """The parts that the kernels support.

    Args:
        program: the update.
        arrays: its inputs.
        replaced: the place of the result that replaces each input that is Blockwise.
        configs: of the results that are arrays of the state.
    """
    numbers = {v: n for n, v in enumerate(program.jaxpr.invars)}
    found = []
    for part in elementwise_parts(program, replaced):
        inputs = {at: numbers[v] for at, v in enumerate(part.arrays) if v in numbers}
        stored = {at: n for at, n in inputs.items() if n in replaced}
        results = {at: replaced[n] for at, n in stored.items() if replaced[n] in part.places}
        dtypes = dict(zip(part.places, part.dtypes, strict=True))
        is_able = all(is_supported(arrays[n]) for n in stored.values()) and all(
            is_stored_alike(arrays[stored[at]], configs[place], dtypes[place])
            for at, place in results.items()
        )
        if is_able:
            pairs: Any = {at: (place, configs[place]) for at, place in results.items()}
            found.append(StatePart(part, {at: pairs.get(at) for at in stored}))
    return found


def _results(
    program: Any,
    parts: Sequence[StatePart],
    arrays: Sequence[Any],
    seeds: Mapping[int, Seed],
) -> dict[int, Any]:
    """The results of the program by place, Blockwise ones from the parts."""
    rest, places, computed = remaining_program(program, [plan.part for plan in parts])
    values = [x.dequantize() if _is_stored(x) else x for x in (arrays[i] for i in places)]
    found = run_program(rest, values)
    known = dict(zip(program.jaxpr.invars, arrays, strict=True))
    known |= dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    known |= dict(zip(computed, found, strict=False))
    done, finished = {}, []
    for plan in parts:
        part, size = plan.part, math.prod(plan.part.shape)
        given, scalars = ([known[v] for v in vs] for vs in (part.arrays, part.scalars))
        noise = {place: seeds[place] for place in plan.configs if place in seeds}
        results = plan.compute(given, scalars, noise, _before(finished, size))
        done |= results
        finished += [(size, results[place].q.scale) for place in plan.configs][:1]
    others = (i for i in range(len(program.jaxpr.outvars)) if i not in done)
    return done | dict(zip(others, found[len(computed) :], strict=True))


def _before(finished: Sequence[tuple[int, jax.Array]], size: int) -> jax.Array:
    """A result of the last part that must be finished before one of a size starts."""
    for other, result in reversed(finished):
        size += other
        if size > _TOGETHER:
            return result
    return jnp.zeros(0, jnp.float32)


def _in_box_of(like: Any, x: Any = 0) -> Any:
    """x in the pytree that the codes of a Blockwise array are in; as it is for other arrays."""
    boxes = jax.tree.structure(like.q.codes if _is_stored(like) else 0)
    return jax.tree.unflatten(boxes, [x])


def _bare(x: Any) -> Any:
    """An array, or a Blockwise array without the box of its codes."""
    if not _is_stored(x):
        return x
    (codes,) = jax.tree.leaves(x.q.codes)
    return dataclasses.replace(x, q=dataclasses.replace(x.q, codes=codes))


def _abstract(x: Any) -> Any:
    return jax.eval_shape(x.dequantize) if _is_stored(x) else x


def _is_stored(x: object) -> bool:
    return isinstance(x, Blockwise)
