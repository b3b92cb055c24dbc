"""One tensor of a checkpoint: read, quantized and written in parts."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..core import Inputs, QTensor, block_shape, devices_of
from ..core import quantize as quantize_array
from ..tree import ReportRow, Rule, Rules
from ..tree.internal import (
    Plan,
    TreeWriter,
    apply_method,
    histogram,
    is_finite,
    powers,
    quantize_by_plan,
    quantize_in_order,
    row_of,
    sqnr_of,
    stored_order,
)
from .load import put
from .source import Source

# Elements of one part. As float32 with what quantizing it needs they take some 256 MB.
_PART = 2**24


@dataclasses.dataclass
class TensorTask:
    """One tensor that is read, quantized if its rule says so, and written in parts."""

    name: str
    value: Source | QTensor
    rule: Rule | None
    statistics: Mapping[str, Any]
    sharding: Any
    is_writer: bool
    signal: float = 0.0
    noise: float = 0.0
    codes: tuple[int, ...] = ()

    @property
    def plan(self) -> Plan | None:
        """How it is quantized; None if it is not."""
        return self.rule and self.rule.plan()

    def write(self, writer: TreeWriter | None, rules: Rules) -> ReportRow:
        """Writes it, if this process does, and returns its row of the report."""
        form = self._form()
        rows: list[ReportRow] = []

        def row() -> dict[str, Any]:
            before = jax.ShapeDtypeStruct(self.value.shape, self.value.dtype)
            sqnr = None if self.plan is None else sqnr_of(self.signal, self.noise)
            before = self.value if isinstance(self.value, QTensor) else before
            rows.append(row_of(self.name, before, form, self.rule, rules, sqnr, self.codes))
            return dataclasses.asdict(rows[0])

        parts = map(_on_host, self._parts(form))
        if writer is None:
            for _ in parts:
                pass
            row()
        else:
            writer.add(self.name, form, parts, row)
        return rows[0]

    def _form(self) -> Any:
        """Shapes and dtypes of the result."""
        plan = self.plan
        if plan is None:
            return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), self.value)
        scheme, axis = plan.scheme, plan.axis
        leaf: Any = jax.ShapeDtypeStruct(self.value.shape, self.value.dtype)
        if plan.method is not None and leaf.size:
            found = self.statistics.get(self.name)
            return jax.eval_shape(lambda x: apply_method(self.name, x, plan, found)[0], leaf)
        q = jax.eval_shape(partial(quantize_array, axis=axis), leaf, scheme.weights)
        order = stored_order(leaf, plan)
        q = jax.eval_shape(lambda q: q.reorder(order), q)
        return q if scheme.inputs is None else dataclasses.replace(q, inputs=Inputs(scheme.inputs))

    def _parts(self, form: Any) -> Iterator[Any]:
        """The result in parts along the first axis of the stored arrays."""
        if isinstance(self.value, QTensor):
            # Not divided, so that blocks stay as they are stored.
            q = put(self.value)
            self.codes = histogram(q)
            yield q
            return
        length = self.value.shape[0] if self.value.shape else 1
        rows = min(self._rows(form), length) or 1
        for start in range(0, max(length, 1), rows):
            is_whole, stop = rows >= length, min(start + rows, length)
            yield self._part(self.value if is_whole else self.value.part(start, stop), form)

    def _part(self, source: Source, form: Any) -> Any:
        if self.plan is None:
            return source.read() if self.is_writer else None
        fits = source.shape == self.value.shape or _divides(self.sharding, source.shape)
        sharding = self.sharding if fits else _replicated(self.sharding)
        x = source.put(whole(sharding) if self.plan.method else sharding)
        check_finite(self.name, x)
        q = quantized(self.name, x, self.plan, form.order, self.statistics)
        signal, noise, unit = (float(p) for p in powers(x, q))
        self.signal += signal * unit * unit
        self.noise += noise * unit * unit
        counts = histogram(q)
        self.codes = tuple(map(sum, zip(self.codes or (0,) * len(counts), counts, strict=True)))
        return q

    def _rows(self, form: Any) -> int:
        """Rows of a part: all of them, if parts would have other scales."""
        shape = self.value.shape
        has_method = self.plan is not None and self.plan.method is not None
        if len(shape) < 2 or math.prod(shape) <= _PART or has_method:
            return shape[0] if shape else 1
        block = 1
        if self.plan is not None:
            config = self.plan.scheme.weights
            block = block_shape(shape, config, self.plan.axis)[0]
            if form.order is not None or isinstance(form.scale, QTensor) or block == shape[0]:
                return shape[0]
        # Of whole blocks, whole bytes, and the same number for each device.
        step = math.lcm(block, 8, _devices_of_rows(self.sharding))
        return max(_PART // math.prod(shape[1:]) // step, 1) * step


def quantized(
    name: str,
    x: Any,
    plan: Plan,
    order: tuple[int, ...] | None,
    statistics: Mapping[str, Any],
) -> QTensor:
    """A tensor or a part of one, quantized; `order` is that of its stored axes without a method."""
    if plan.method is not None:
        return quantize_by_plan(name, x, plan, statistics.get(name))
    q = quantize_in_order(x, plan, order)
    inputs = plan.scheme.inputs
    return q if inputs is None else dataclasses.replace(q, inputs=Inputs(inputs))


def check_finite(name: str, x: Any) -> None:
    """Raises a ValueError for NaN or Inf."""
    if not is_finite(x):
        raise ValueError(
            f"{name} holds NaN or Inf, shape {x.shape}; fix the checkpoint, or give it a rule with "
            "None."
        )


def _devices_of_rows(sharding: Any) -> int:
    if not isinstance(sharding, jax.sharding.NamedSharding) or not sharding.spec:
        return 1
    return devices_of(sharding.spec[0], sharding.mesh)


def _divides(sharding: Any, shape: tuple[int, ...]) -> bool:
    return shape[0] % _devices_of_rows(sharding) == 0


def _replicated(sharding: Any) -> Any:
    """For the last rows, which the devices cannot share."""
    return sharding.update(spec=jax.P(None, *sharding.spec[1:]))


def whole(sharding: Any) -> Any:
    """For tensors that each device holds whole."""
    is_named = isinstance(sharding, jax.sharding.NamedSharding)
    return sharding.update(spec=jax.P()) if is_named else sharding


def _on_host(leaf: Any) -> Any:
    """The arrays of a leaf as NumPy arrays, whole in each process."""

    def gathered(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(gathered, leaf)
