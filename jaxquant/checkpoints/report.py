"""What a checkpoint stores, and what becomes of it, as a table."""

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..core import QTensor, describe, packed_bytes
from ..tree.internal import to_text
from .stored import Stored

if TYPE_CHECKING:
    import rich.table


@dataclasses.dataclass(frozen=True)
class CheckpointRow:
    """One tensor of a checkpoint.

    Attributes:
        name: of the tensor.
        shape: of the array.
        kind: how the file calls its type.
        becomes: what it is loaded as.
        bits_per_weight: bits per element once loaded, in device memory.
        bytes_stored, bytes_loaded: in the file, and in device memory.
        is_exact: whether it represents exactly the numbers that the file's own decoder gives.
        note: why not, or what else differs from the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    becomes: str
    bits_per_weight: float
    bytes_stored: int
    bytes_loaded: int
    is_exact: bool
    note: str


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """Rows by tensor. Print it, or use `table()`, `rows` or `to_json()`."""

    title: str
    rows: tuple[CheckpointRow, ...]

    def table(self) -> "rich.table.Table":
        """The rows and their total as a rich table."""
        # rich is slow to import, and only tables need it.
        import rich.markup
        import rich.table

        stored, loaded = (
            sum(getattr(r, k) for r in self.rows) for k in ("bytes_stored", "bytes_loaded")
        )
        exact = sum(r.is_exact for r in self.rows)
        table = rich.table.Table(title=rich.markup.escape(self.title), show_footer=True)
        table.add_column("tensor", f"total of {len(self.rows)}")
        table.add_column("shape", justify="right")
        table.add_column("stored as")
        table.add_column("becomes")
        table.add_column("bits per weight", justify="right")
        table.add_column("MB stored", f"{stored / 1e6:.3f}", justify="right")
        table.add_column("MB loaded", f"{loaded / 1e6:.3f}", justify="right")
        table.add_column("exact", f"{exact} of {len(self.rows)}")
        for row in self.rows:
            texts = [row.name, "x".join(map(str, row.shape)) or "scalar", row.kind, row.becomes]
            table.add_row(
                *map(rich.markup.escape, texts),
                f"{row.bits_per_weight:.2f}",
                f"{row.bytes_stored / 1e6:.3f}",
                f"{row.bytes_loaded / 1e6:.3f}",
                rich.markup.escape(row.note or "exact"),
                style=None if row.is_exact else "yellow",
            )
        return table

    def to_json(self) -> dict[str, Any]:
        """The rows as JSON values."""
        return {"title": self.title, "rows": [dataclasses.asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        return to_text(self.table(), width=160)


def rows_of(tensors: Iterable[Stored]) -> tuple[CheckpointRow, ...]:
    """One row per tensor."""
    return tuple(_row(stored) for stored in tensors)


def _row(stored: Stored) -> CheckpointRow:
    value: Any = stored.value
    loaded = value.nbytes if isinstance(value, QTensor) else packed_bytes(value)
    return CheckpointRow(
        stored.name,
        value.shape,
        stored.kind,
        describe(value) if isinstance(value, QTensor) else str(value.dtype),
        8 * loaded / max(math.prod(value.shape), 1),
        stored.nbytes,
        loaded,
        stored.is_exact,
        stored.note,
    )
