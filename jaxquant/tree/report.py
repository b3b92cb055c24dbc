"""Reports of what quantization changed in a tree, as rows, a table or a picture."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import LowRank, TrainedArray, describe, packed_bytes
from .doubts import doubt
from .effective import effective
from .paths import is_quantized, leaves_with_paths
from .plot import plot_report
from .report_row import ReportRow
from .report_table import report_table, to_text
from .rules import DefaultRule, Rules, as_rules, match_rules

if TYPE_CHECKING:
    import rich.table


@dataclasses.dataclass(frozen=True)
class Report:
    """Rows and their totals. Print it, or use `table()` or `rows`.

    Example:
        >>> params = {"kernel": jnp.ones((32, 16)), "bias": jnp.ones(16)}
        >>> report = jq.tree.report(params, jq.tree.quantize(params, jq.W8A8))
        >>> report.total.scheme
        '1 of 2 leaves quantized'
    """

    rows: tuple[ReportRow, ...]

    @property
    def total(self) -> ReportRow:
        """All rows as one; its SQNR is None."""
        before, after = (sum(getattr(r, k) for r in self.rows) for k in _BYTES)
        size = sum(math.prod(r.shape) for r in self.rows)
        done = sum(r.scheme is not None for r in self.rows)
        title = f"{done} of {len(self.rows)} leaves quantized"
        return ReportRow(
            "total", (size,), title, None, 8 * after / max(size, 1), before, after, None
        )

    def table(self) -> "rich.table.Table":
        """The rows and totals as a rich table."""
        return report_table(self.rows, self.total)

    def to_json(self) -> dict[str, Any]:
        """Rows and total as JSON values. An infinite or absent SQNR is null."""
        return {"rows": [_json(r) for r in self.rows], "total": _json(self.total)}

    def plot(self, path: str) -> None:
        """Draws the SQNR of each leaf and the codes' histogram of each scheme into a picture.

        Args:
            path: file to write; its extension determines the format, such as ".png" or ".svg".

        Raises:
            ImportError: matplotlib is not installed: `pip install 'jaxquant[plot]'`.
            ValueError: no leaf is quantized.
        """
        plot_report(self.rows, path)

    def __str__(self) -> str:
        return to_text(self.table())


_BYTES = ("bytes_before", "bytes_after")


def report(
    params: Any,
    quantized: Any,
    rules: Rules | None = None,
    *,
    contracted: Mapping[str, tuple[int, ...]] | None = None,
) -> Report:
    """Compares a tree with its quantized form, leaf by leaf.

    Args:
        params: the tree before quantization, or None for a report without a comparison.
        quantized: the tree from `tree.quantize`. A tree from `training.prepare` is converted
            with `training.convert` first.
        rules: the rules passed to `tree.quantize`, so that the report can name the rule that
            left a leaf in float. With None, reasons come from the leaf alone.
        contracted: the axes that a function contracts, by path: `jaxquant.uses(...).contracted`.
            Rows of leaves whose scales are shared along other axes get a warning.

    Returns:
        Report with one row per leaf.

    Raises:
        ValueError: the two trees do not have the same leaves, or one differs in shape.

    Example:
        >>> params = {"kernel": jnp.ones((64, 8))}
        >>> report = jq.tree.report(params, jq.tree.quantize(params, jq.W8A8))
        >>> report.rows[0].scheme, report.total.bits_per_weight
        ('int8 per channel, int8 inputs', 8.5)
    """
    paths, after, _ = leaves_with_paths(quantized)
    after = [jax.jit(type(x).convert)(x) if isinstance(x, TrainedArray) else x for x in after]
    before = _leaves_before(params, paths) if params is not None else [None] * len(paths)
    originals = [a if b is None else b for a, b in zip(after, before, strict=True)]
    _check_shapes(paths, originals, after)
    chosen = (
        [None] * len(paths) if rules is None else match_rules(as_rules(rules), paths, originals)
    )
    items = zip(paths, before, after, chosen, strict=True)
    known = contracted or {}
    return Report(
        tuple(_row(path, x, q, rule, rules, known.get(path)) for path, x, q, rule in items)
    )


def _leaves_before(params, paths):
    before, leaves, _ = leaves_with_paths(params)
    if before != paths:
        odd = sorted(set(before) ^ set(paths))[:5] or before[:5]
        raise ValueError(
            f"Both trees must have the same leaves; got {len(before)} and {len(paths)}, which "
            f"differ at {', '.join(odd)}. Pass the tree that was quantized, and its result."
        )
    return leaves


def _check_shapes(paths: list[str], before: list[Any], after: list[Any]) -> None:
    for path, x, q in zip(paths, before, after, strict=True):
        if np.shape(x) != np.shape(q):
            raise ValueError(
                f"Both trees must have the same shapes; got {np.shape(x)} and {np.shape(q)} at "
                f"{path}. Pass the tree that was quantized, and its result."
            )


def _row(path, x, q, rule, rules, contracted):
    if not is_quantized(q):
        return row_of(path, q if x is None else x, q, rule, rules)
    before = jax.ShapeDtypeStruct(q.shape, q.dtype) if x is None else x
    sqnr = None if x is None or is_quantized(x) else _sqnr(x, q)
    return row_of(path, before, q, rule, rules, sqnr, histogram(q), contracted)


def row_of(
    path: str,
    before: Any,
    q: Any,
    rule: Any,
    rules: Any,
    sqnr: float | None = None,
    codes: tuple[int, ...] = (),
    contracted: tuple[int, ...] | None = None,
) -> ReportRow:
    """The row of a leaf, from its SQNR and the histogram of its codes.

    Args:
        path: of the leaf.
        before, q: the leaf and its quantized form, of arrays or of their shapes and dtypes.
        rule: that matched the leaf, or None.
        rules: all of them, or None.
        sqnr, codes, contracted: as for `ReportRow` and `report`.
    """
    shape, after = tuple(np.shape(q)), _bytes(q)
    sizes = 8 * after / max(math.prod(shape), 1), _bytes(before), after
    if not is_quantized(q):
        return ReportRow(path, shape, None, _reason(q, rule, rules), *sizes, None)
    warning = doubt(path, q, isinstance(rule, DefaultRule), contracted)
    return ReportRow(path, shape, describe(q), None, *sizes, sqnr, codes, warning)


def _bytes(x: Any) -> int:
    if is_quantized(x):
        return x.nbytes
    return packed_bytes(x) if hasattr(x, "dtype") else np.asarray(x).nbytes


def _reason(x, rule, rules):
    if rule is not None:
        return rule.note or f"left by rule {rule.pattern!r}"
    if rules is not None:
        return "no rule matches"
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        return f"not an array: {type(x).__name__}"
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"not floating: {dtype}"
    return f"left as {dtype}, {x.ndim} {'axis' if x.ndim == 1 else 'axes'}"


@jax.jit
def powers(x: jax.Array, q: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of squares of signal and noise, in units of the signal's largest magnitude, and that."""
    dtype = x.dtype if x.dtype == jnp.float64 else jnp.float32
    x = x.astype(dtype)
    noise = x - effective(q).astype(dtype)
    # In float32 the square of 1e-23 is 0 and that of 1e20 is infinite.
    largest = jnp.max(jnp.abs(x), initial=0)
    unit = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    return jnp.sum(jnp.square(x / unit)), jnp.sum(jnp.square(noise / unit)), unit


def _sqnr(x, q):
    try:
        signal, noise, _ = (float(p) for p in powers(x, q))
    except ValueError:
        return None  # Its scales do not say how its activations are changed.
    return sqnr_of(signal, noise)


def sqnr_of(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio in dB."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def histogram(q: Any) -> tuple[int, ...]:
    """Counts of codes in equal bins; codebook codes are counted by index."""
    q = q.base if isinstance(q, LowRank) else q
    levels = q.format.codebook
    low, high = (0, len(levels)) if levels else (q.format.qmin, q.format.qmax)
    high += float(q.format.rounds)
    bins = min(16, 2**q.format.bits)
    total = np.zeros(bins, int)
    for codes in _parts(q.codes):
        values, counts = _code_counts(np.asarray(codes))
        values = np.mod(values, 2**q.format.bits) if levels else values
        places = np.floor((np.nan_to_num(values, nan=low) - low) / (high - low) * bins)
        np.add.at(total, np.clip(places, 0, bins - 1).astype(int), counts)
    return tuple(total.tolist())


def _parts(codes):
    """Arrays that together hold the codes; those of this process, if there are several."""
    if isinstance(codes, jax.Array):
        return [s.data for s in codes.addressable_shards if s.replica_id == 0]
    return [codes]


def _code_counts(codes):
    """Different codes as float32, and how often each occurs."""
    if codes.dtype.itemsize > 1:
        values, counts = np.unique_counts(codes)
        return values.astype(np.float32), counts
    # In pairs of bytes and on the host: XLA's scatter took four times as long on CPU.
    data = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
    even = data.size // 2 * 2
    pairs = np.bincount(data[:even].view(np.uint16), minlength=2**16).reshape(256, 256)
    counts = pairs.sum(0) + pairs.sum(1) + np.bincount(data[even:], minlength=256)
    used = np.flatnonzero(counts)
    return used.astype(np.uint8).view(codes.dtype).astype(np.float32), counts[used]


def _json(row):
    fields = dataclasses.asdict(row)
    has_sqnr = row.sqnr is not None and math.isfinite(row.sqnr)
    return {**fields, "sqnr": row.sqnr if has_sqnr else None}
