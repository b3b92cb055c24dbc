"""`uses`: how a function uses its parameters, and the rules to quantize them that follow."""

import dataclasses
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ..core import ArrayConfig, Scheme
from ..tree import Rule
from ..tree.internal import leaves_with_paths, to_text
from .find_uses import Use, find_uses
from .trace import is_input, plain_arrays, trace_function
from .views import view_of

if TYPE_CHECKING:
    import rich.table

_QUANTIZED_USES = ("product", "convolution", "lookup")


@dataclasses.dataclass(frozen=True)
class Uses:
    """How a function uses each of its parameters. Print it, or use `table()`.

    Attributes:
        shapes: the shape of each parameter, by path.
        by_path: the uses of each parameter, in the order of the program; empty if the result does
            not depend on it.

    Example:
        >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
        >>> found = jq.uses(lambda p, x: x @ p["kernel"] + p["bias"], params, jnp.ones((2, 8)))
        >>> found.contracted
        {'kernel': (0,)}
        >>> [use.primitive for use in found.by_path["bias"]]
        ['add']
    """

    shapes: Mapping[str, tuple[int, ...]]
    by_path: Mapping[str, tuple[Use, ...]]

    @cached_property
    def contracted(self) -> dict[str, tuple[int, ...]]:
        """The axes along which elements of each matrix, kernel or table should share a scale.

        Those that a product or convolution sums over. Of a table that is only looked up, the axes
        of a row.
        """
        found = {path: self._axes(path) for path in self.by_path}
        return {path: axes for path, axes in found.items() if axes}

    def _axes(self, path):
        uses = [use for use in self.by_path[path] if use.kind in _QUANTIZED_USES]
        ndim = len(self.shapes[path])
        summed = [use.contracted for use in uses if use.contracted]
        apart = {a for use in uses for a in use.stacked}
        if ndim - len(apart) < 2:
            return ()
        if summed:
            return max(summed, key=lambda axes: (summed.count(axes), -summed.index(axes)))
        rows = {a for use in uses for a in (*use.looked_up, *use.batched)}
        return tuple(a for a in range(ndim) if a not in rows | apart) if uses else ()

    def shared_activations(self) -> list[tuple[str, ...]]:
        """Groups of parameters that are multiplied by the same activations, such as Q, K and V."""
        pairs = [(path, use) for path, uses in self.by_path.items() for use in uses]
        groups: dict[Any, dict[str, None]] = {}
        for path, use in pairs:
            if use.activations is not None:
                groups.setdefault((use.activations, use.contracted), {})[path] = None
        return [tuple(group) for group in groups.values() if len(group) > 1]

    def rules(self, scheme: Scheme | ArrayConfig) -> tuple[Rule, ...]:
        """Rules for `tree.quantize` with the axes that the function contracts.

        Matrices, kernels of convolutions and tables are quantized. A group spans contracted
        elements that lie next to each other, over several axes if need be, or else along one axis,
        or else a box, such as 4 x 8 pixels of a kernel (8, 8, 3, N) for groups of 32. Where the
        function joins the contracted axes first, only neighbours form groups. Other parameters
        stay in float, and so do those that no group fits, of which a warning tells; a report gives
        the reasons.

        Args:
            scheme: for all of them.

        Returns:
            One rule per parameter.

        Raises:
            ValueError: scheme is neither a Scheme nor an ArrayConfig; the function does not use
                any parameter in a product, convolution or lookup; or the groups of the scheme fit
                none of them.

        Example:
            >>> params = {"out": jnp.ones((4, 8, 32)), "scale": jnp.ones(32)}
            >>> def apply(params, x):
            ...     return jnp.einsum("bhk,hkd->bd", x, params["out"]) * params["scale"]
            >>> found = jq.uses(apply, params, jnp.ones((2, 4, 8)))
            >>> [rule.axis for rule in found.rules(jq.W8A8)]
            [(0, 1), None]
            >>> jq.tree.quantize(params, found.rules(jq.W8A8))["out"].scale.size
            32
        """
        if not isinstance(scheme, Scheme | ArrayConfig):
            raise ValueError(
                f"rules expects a Scheme or an ArrayConfig, such as jq.W8A8; got {scheme!r}."
            )
        if not self.contracted:
            raise ValueError(
                "rules needs a parameter that is used in a product, convolution or lookup; got "
                f"uses of {', '.join(self.by_path) or 'no parameter'}. Pass the parameters as the "
                "second argument of uses, not closed over."
            )
        rules = tuple(self._rule(path, scheme) for path in self.by_path)
        if all(rule.scheme is None for rule in rules):
            notes = dict.fromkeys(str(self._rule(path, scheme).note) for path in self.contracted)
            raise ValueError(
                f"rules needs a scheme that fits a parameter; got {scheme!r}: {', '.join(notes)}. "
                "Choose another group_size, or another format if it has a fixed one."
            )
        left = {p: r.note for p, r in zip(self.by_path, rules, strict=True)
                if r.scheme is None and p in self.contracted}  # fmt: skip
        if left:
            _warn_of(left)
        return rules

    def _rule(self, path, scheme):
        pattern = "re:" + re.escape(path)
        axes, shape = self.contracted.get(path), self.shapes[path]
        if axes is None:
            names = dict.fromkeys(use.primitive for use in self.by_path[path])
            note = f"used by {', '.join(names)}" if names else "not used"
            return Rule(pattern, None, note=note)
        weights = scheme.weights if isinstance(scheme, Scheme) else scheme
        size = weights.group_size or weights.format.group_size
        used = [use for use in self.by_path[path] if use.kind in _QUANTIZED_USES]
        is_joined = any(use.is_joined for use in used)
        # A convolution with one pixel multiplies, too.
        kinds = {"product", "convolution"} if sum(shape[a] > 1 for a in axes) < 2 else {"product"}
        is_matrix = all(use.kind in kinds and use.contracted == axes for use in used)
        contracted = axes if len(axes) > 1 and is_matrix and not is_joined else None
        rule = partial(Rule, pattern, scheme, contracted=contracted)
        if size is None:
            return rule(axis=axes)
        lay = partial(lay_group, axes=axes, shape=shape, is_joined=is_joined)
        blocks = lay(size) if isinstance(size, int) else None
        is_fixed = weights.format.group_size is not None
        if blocks is None or (is_fixed and len(blocks) > 1):
            lengths = " x ".join(str(shape[a]) for a in axes)
            note = f"groups of {size} do not fit {lengths} contracted elements"
            smaller = None if is_fixed or not isinstance(size, int) else _smaller_size(size, lay)
            note += "" if smaller is None else f"; groups of {smaller} do"
            return Rule(pattern, None, note=note)
        group = None if is_fixed else tuple(blocks.values())
        axis = tuple(blocks)
        if len(axis) == 1:
            return rule(axis=axis[0], group_size=group and group[0])
        return rule(axis=axis, group_size=group)

    def table(self) -> "rich.table.Table":
        """One row per parameter as a rich table."""
        # rich is slow to import, and only tables need it.
        import rich.markup
        import rich.table

        table = rich.table.Table(title="Uses of parameters")
        for name in ("parameter", "shape", "used by", "share a scale along"):
            table.add_column(name)
        for path, uses in self.by_path.items():
            shape = "x".join(map(str, self.shapes[path]))
            words = "\n".join(dict.fromkeys(_words(use) for use in uses)) or "nothing"
            axes = self.contracted.get(path)
            cells = path, shape, words, "" if axes is None else ", ".join(map(str, axes))
            table.add_row(*map(rich.markup.escape, cells))
        return table

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_path)

    def __rich__(self) -> "rich.table.Table":
        return self.table()

    def __str__(self) -> str:
        return to_text(self.table())


def _warn_of(left: dict[str, str | None]) -> None:
    """Warns of parameters that stay in float, with the reasons."""
    reasons = []
    for note in dict.fromkeys(left.values()):
        paths = [path for path in left if left[path] == note]
        more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
        reasons += [f"{note} ({', '.join(paths[:4])}{more})"]
    warnings.warn(
        f"These parameters stay in float: {'; '.join(reasons)}. Choose another group_size, or "
        "write rules for them.",
        stacklevel=3,
    )


def _words(use):
    words = [use.primitive]
    facts = ("contracted", "batched", "looked_up", "stacked")
    for name in facts:
        axes = getattr(use, name)
        words += [f"{name.replace('_', ' ')} {', '.join(map(str, axes))}"] if axes else []
    return "; ".join(words)


def lay_group(
    size: int, axes: Sequence[int], shape: Sequence[int], is_joined: bool
) -> dict[int, int] | None:
    """The block length along each axis of a group of `size` elements; None if none fits.

    Args:
        size: elements of a group.
        axes: contracted axes, slow to fast.
        shape: of the parameter.
        is_joined: whether only neighbours form groups that lie along one axis after the function
            joins the axes.
    """
    neighbours, left = {}, size
    for a in reversed(axes):
        common = math.gcd(left, shape[a])
        if common not in (left, shape[a]):
            break
        neighbours[a] = common
        left //= common
        if left == 1:
            return dict(sorted(neighbours.items()))
    if is_joined:
        return None
    # Elements that are not neighbours: the channels of one pixel of a kernel, or else boxes.
    whole = next(({a: size} for a in axes if shape[a] % size == 0), None)
    return whole or _lay_box(size, axes, shape)


def _lay_box(size, axes, shape):
    """As long as possible along the fastest axes."""
    blocks, left = {}, size
    for a in reversed(axes):
        blocks[a] = math.gcd(left, shape[a])
        left //= blocks[a]
    box = {a: n for a, n in sorted(blocks.items()) if n > 1}
    return box if left == 1 else None


def _smaller_size(size, lay):
    """The largest half, quarter or eighth and so on of a group size that fits; None below 8."""
    sizes = itertools.takewhile(lambda n: n >= 8, (size >> i for i in itertools.count(1)))
    return next((n for n in sizes if lay(n) is not None), None)


def uses(fn: Callable[..., Any], params: Any, *args: Any) -> Uses:
    """Finds how fn(params, *args) uses each parameter. Nothing is computed: fn is only traced.

    The axes that it finds are exact for any model, in any framework: kernels of attention with
    three axes, tied embeddings, layers stacked for `jax.lax.scan`, convolutions in any layout,
    weights that are transposed or reshaped first.

    Args:
        fn: a function, such as `model.apply`.
        params: any pytree of arrays, `jax.ShapeDtypeStruct`s or quantized arrays.
        args: its other arguments.

    Returns:
        Uses; `tree.quantize(params, found.rules(scheme))` quantizes the parameters.

    Raises:
        ValueError: fn is not a function, or params does not contain an array.

    Example:
        >>> params = {"q": jnp.ones((8, 2, 4)), "k": jnp.ones((8, 2, 4)), "embed": jnp.ones((9, 8))}
        >>> def apply(params, tokens):
        ...     x = params["embed"][tokens]
        ...     heads = [jnp.einsum("td,dhk->thk", x, params[name]) for name in "qk"]
        ...     return jnp.einsum("thk,shk->hts", *heads) @ jnp.ones((3, 1))
        >>> found = jq.uses(apply, params, jnp.array([1, 2, 3]))
        >>> found.contracted
        {'embed': (1,), 'k': (0,), 'q': (0,)}
        >>> found.shared_activations()
        [('k', 'q')]
    """
    if not callable(fn):
        raise ValueError(
            f"uses expects a function and its arguments, as in uses(model.apply, params, x); got "
            f"{type(fn).__name__}."
        )
    paths, leaves, _ = leaves_with_paths(params)
    if not any(map(_is_abstract_input, leaves)):
        raise ValueError(
            f"params must contain arrays; got {type(params).__name__} with leaves "
            f"{', '.join(paths[:8]) or 'none'}."
        )
    _, every, treedef = leaves_with_paths(((params, *args), {}))
    every = plain_arrays(every)
    places = [i for i, x in enumerate(every) if _is_abstract_input(x)]
    program = trace_function(fn, every, treedef, places).program
    floats = [
        view_of(paths[i], every[i].shape)
        if i < len(paths) and jnp.issubdtype(every[i].dtype, jnp.floating)
        else None
        for i in places
    ]
    found: dict[str, list[Use]] = {view.path: [] for view in floats if view is not None}
    for path, use in find_uses(program, floats):
        found[path].append(use)
    shapes = {paths[i]: every[i].shape for i in places if i < len(paths)}
    return Uses(shapes, {path: tuple(found[path]) for path in found})


def _is_abstract_input(x):
    return is_input(x) or isinstance(x, jax.ShapeDtypeStruct)
