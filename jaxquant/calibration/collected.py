"""The statistics of a model's activations, by parameter: what `collect` returns."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ..methods import SecondMoment, Statistic, predicted_gain
from ..methods.internal import STATISTICS
from ..tree import load, save
from ..tree.internal import MALFORMED, to_text

if TYPE_CHECKING:
    import rich.table

_KIND = "statistics of activations"


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics(Mapping[str, Mapping[type[Statistic], Any]]):
    """Statistics of activations by the path of the parameter that they meet. Print it for a table.

    Attributes:
        by_path: for each path, statistics by class; leading axes are those of stacked layers.
        is_complete: whether every slice of every parameter met activations; otherwise those that
            did not are rounded to nearest.

    Example:
        >>> params, kind = {"kernel": jnp.ones((2, 3))}, jq.methods.MeanSquare
        >>> def apply(params, x):
        ...     return x @ params["kernel"]
        >>> found = jq.collect(apply, params, [jnp.ones((4, 2))], jq.W8A8, kind)
        >>> found.save("statistics.safetensors")
        >>> jq.Statistics.load("statistics.safetensors")["kernel"][kind].finish().tolist()
        [1.0, 1.0]
    """

    by_path: Mapping[str, Mapping[type[Statistic], Any]]
    is_complete: bool = True

    def __getitem__(self, path: str) -> Mapping[type[Statistic], Any]:
        return self.by_path[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_path)

    def __len__(self) -> int:
        return len(self.by_path)

    def merge(self, other: "Statistics") -> "Statistics":
        """The statistics of the batches of both, such as those of several processes.

        Raises:
            ValueError: they are of other parameters, of other kinds or of other shapes.
        """
        paths = dict.fromkeys([*self, *other])
        differing = [p for p in paths if not _can_merge(self.get(p), other.get(p))]
        if differing:
            raise ValueError(
                "Only the same statistics of the same parameters can be merged; got different ones "
                f"of {', '.join(differing[:4])}. Collect both with the same parameters, rules and "
                "methods."
            )
        merged = {
            path: {kind: s.merge(other[path][kind]) for kind, s in self[path].items()}
            for path in self
        }
        return Statistics(merged, self.is_complete and other.is_complete)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file.

        Raises:
            OSError: as for `jaxquant.save`.
        """
        tree = [
            [name, {kind.__name__: [s.total, s.count] for kind, s in kinds.items()}]
            for name, kinds in self.items()
        ]
        save(path, {"kind": _KIND, "is_complete": int(self.is_complete), "by_path": tree})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Statistics":
        """Reads a file that `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is malformed, or another kind of file.
        """
        tree = load(path)
        if not isinstance(tree, dict) or tree.get("kind") != _KIND:
            raise ValueError(
                f"{path} does not hold statistics; got {type(tree).__name__}. Pass a file that "
                "Statistics.save wrote."
            )
        try:
            by_path = {
                name: dict(_decoded(kind, parts) for kind, parts in kinds.items())
                for name, kinds in tree["by_path"]
            }
            return cls(by_path, bool(tree["is_complete"]))
        except MALFORMED as error:
            raise ValueError(
                f"{path} holds malformed statistics; got {type(error).__name__}: {error}. Write it "
                "with Statistics.save of this version."
            ) from error

    def table(self) -> "rich.table.Table":
        """One row per parameter as a rich table.

        The predicted gain is by how much error feedback (GPTQ) lowers the output error of rounding
        to nearest, from `SecondMoment`.
        """
        # rich is slow to import, and only tables need it.
        import rich.markup
        import rich.table

        table = rich.table.Table(title="Statistics of activations")
        for name in ("parameter", "statistics", "slices", "rows", "predicted gain of GPTQ"):
            table.add_column(name)
        for path, kinds in self.items():
            first = next(iter(kinds.values()))
            gain = ""
            if SecondMoment in kinds:
                means = kinds[SecondMoment].finish()
                means = means.reshape(-1, *means.shape[-2:])
                gains = np.asarray(jax.lax.map(predicted_gain, means))
                known = gains[np.isfinite(gains)]  # Of slices that met activations.
                gain = f"{known.mean():.1f} dB" if known.size else ""
            table.add_row(
                rich.markup.escape(path),
                ", ".join(kind.__name__ for kind in kinds),
                str(np.size(first.count)),
                f"{np.mean(first.count):.0f}",
                gain,
            )
        return table

    def __rich__(self) -> "rich.table.Table":
        return self.table()

    def __str__(self) -> str:
        return to_text(self.table())

    def __repr__(self) -> str:
        return f"Statistics({len(self)} parameters)"


def _can_merge(mine: Mapping[Any, Any] | None, others: Mapping[Any, Any] | None) -> bool:
    """Whether both are the same kinds with sums of the same shapes, if they have any rows."""
    if mine is None or others is None or mine.keys() != others.keys():
        return False
    pairs = [(mine[kind], others[kind]) for kind in mine if np.any(mine[kind].count)]
    return all(np.shape(a.total) == np.shape(b.total) for a, b in pairs if np.any(b.count))


def _decoded(name: str, parts: Any) -> tuple[type[Statistic], Statistic]:
    """The class of a statistic, and the statistic, from what a file holds."""
    known: dict[str, type[Statistic]] = {kind.__name__: kind for kind in STATISTICS}
    if name not in known:
        raise ValueError(f"statistics must be of {', '.join(known)}; got {name!r}")
    total, count = map(np.asarray, parts)
    wanted = (*count.shape, *known[name].shape(total.shape[-1]))
    if total.shape != wanted:
        raise ValueError(
            f"{name} of count {count.shape} must have sums of shape {wanted}; got {total.shape}"
        )
    return known[name], known[name](total, count)


def kinds_of(statistics: Any) -> list[type[Statistic]]:
    """The statistics that are named, or that the methods in a list need.

    Raises:
        ValueError: an item is neither, or none is left.
    """
    found = dict.fromkeys(_kinds_in(statistics))
    if not found:
        raise ValueError(
            f"collect needs a statistic; got {statistics!r}, which needs none. Pass methods that "
            "use activations, or call tree.quantize without statistics."
        )
    return list(found)


def _kinds_in(item: Any) -> Iterator[type[Statistic]]:
    """The statistics of one item, or of all items of a list, which may hold lists."""
    if isinstance(item, list | tuple):
        for part in item:
            yield from _kinds_in(part)
    elif isinstance(item, type) and issubclass(item, Statistic):
        yield item
    elif isinstance(getattr(item, "statistics", None), tuple):
        yield from item.statistics
    else:
        raise ValueError(
            "statistics must be classes such as jq.methods.SecondMoment, or methods such as "
            f"jq.methods.GPTQ(); got {item!r}."
        )
