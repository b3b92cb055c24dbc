"""The sums of one parameter over batches, on the host, and the statistics that they make."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from ..methods import Statistic
from .tap import Parameter


@dataclasses.dataclass(eq=False)
class Sums:
    """Adds up what the taps of one parameter send.

    Attributes:
        parameter: what is multiplied.
        kinds: which statistics.
        waiting: (slice numbers, sums) of the batch that is running.
        sums: by the shape of slices, then by slice.
    """

    parameter: Parameter
    kinds: tuple[type[Statistic], ...]
    waiting: list[Any] = dataclasses.field(default_factory=list)
    sums: dict[tuple[int, ...], dict[int, Any]] = dataclasses.field(default_factory=dict)

    def take(self, numbers: Any, *sums: Any) -> None:
        """Keeps the sums of one product until the program has ended."""
        numbers = np.asarray(numbers)
        self.waiting.append((numbers, [jax.tree.map(np.asarray, s) for s in sums]))

    def add(self) -> None:
        """Adds what waits."""
        while self.waiting:
            numbers, new = self.waiting.pop(0)
            found = self.sums.setdefault(numbers.shape, {})
            first = int(numbers.flat[0])
            old = found.get(first)
            pairs = zip(old or new, new, strict=True)
            found[first] = [b if old is None else a.merge(b) for a, b in pairs]

    def finish(self, allow_missing: bool) -> dict[type[Statistic], Any]:
        """The statistics of all slices, stacked."""
        path, leading = self.parameter.path, self.parameter.leading
        if len(self.sums) > 1:
            raise ValueError(
                f"{path}: products must all use the whole parameter, or slices of one shape; got "
                f"{sorted(self.sums)}. Exclude it with a rule, Rule({path!r}, None)."
            )
        shape, found = next(iter(self.sums.items()), (leading, {}))
        self.sums = {}
        sliced = leading[: len(leading) - len(shape)]
        step = math.prod(leading) // max(math.prod(sliced), 1)
        numbers = [n * step for n in range(math.prod(sliced))]
        absent = [n for n in numbers if n not in found]
        if absent and not allow_missing:
            raise ValueError(
                f"{path}: no batch reached {len(absent)} of its {len(numbers)} slices in a product "
                "or an ungrouped convolution. Pass batches that use it, a rule that leaves it out, "
                "or allow_missing=True to round it to nearest."
            )
        stacked = self._stacked([found.get(n) for n in numbers], sliced)
        for statistic in stacked:
            self._check(statistic, allow_missing)
        return dict(zip(self.kinds, stacked, strict=True))

    def _stacked(self, slices: list[Any], shape: tuple[int, ...]) -> list[Any]:
        """The statistics of slices in an array of this shape; None counts as no rows."""
        known = next((s for s in slices if s is not None), None)
        known = known or [kind.init(self.parameter.channels) for kind in self.kinds]
        empty = [jax.tree.map(np.zeros_like, statistic) for statistic in known]
        columns = zip(*(empty if s is None else s for s in slices), strict=True)
        return [
            jax.tree.map(lambda *s: np.stack(s).reshape((*shape, *s[0].shape)), *column)
            for column in columns
        ]

    def _check(self, statistic: Statistic, allow_missing: bool) -> None:
        path = self.parameter.path
        if not np.all(np.isfinite(statistic.total)):
            raise ValueError(
                f"{path}: activations must be finite, and sums of their squares, too; got NaN or "
                "Inf. Check the batches, or pass a mask if the padding holds them."
            )
        unused = int(np.sum(statistic.count == 0))
        if unused and not allow_missing:
            raise ValueError(
                f"{path}: no row reached {unused} of its {statistic.count.size} slices, such as "
                "experts that no token chose. Pass more batches, or allow_missing=True to round "
                "them to nearest."
            )
