"""Quantizes checkpoints that do not fit in memory, tensor by tensor and in parts of tensors."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ..core import (
    ArrayConfig,
    Inputs,
    QTensor,
    Scheme,
    block_shape,
    config_to_json,
    devices_of,
    refine_blocks,
    specs,
)
from ..core import quantize as quantize_array
from ..tree import Progress, Report, ReportRow, Rule, Rules, default_rules
from ..tree.internal import (
    Plan,
    TreeWriter,
    as_rules,
    histogram,
    is_finite,
    match_rules,
    powers,
    progress_bar,
    quantize_in_order,
    row_of,
    select,
    sqnr_of,
    stored_order,
    why_unsupported_shape,
)
from ..version import __version__
from .checkpoint import Checkpoint
from .dequantized import dequantized
from .load import Shardings, load, put
from .source import Source

# Elements of one part. As float32 with what quantizing it needs they take some 256 MB.
_PART = 2**24


def quantize(
    checkpoint: Checkpoint,
    rules: Rules,
    *,
    sharding: Shardings | Any = None,
    dtype: jax.typing.DTypeLike | None = None,
    requantize: bool = False,
    progress: Progress | bool | None = None,
) -> dict[str, Any]:
    """Loads a checkpoint and quantizes the tensors that `rules` select, one after another.

    What is quantized already is loaded as it is. Memory holds the result and one tensor in float;
    with a sharding, each device quantizes its own part of it.

    Args:
        checkpoint: from `checkpoints.open`.
        rules: as for `tree.quantize`, without methods. For a Scheme or ArrayConfig the contracted
            axis is the last, as Hugging Face and GGUF store kernels (out, in).
        sharding, dtype: as for `Checkpoint.load`; a tree of shardings is a dict by name.
        requantize: whether tensors that are stored quantized and have a rule are dequantized and
            quantized again; otherwise they are an error.
        progress: as for `tree.quantize`.

    Returns:
        A dict by name, of arrays and QTensors.

    Raises:
        ValueError: as for `tree.quantize` and `Checkpoint.load`, or a rule has a method. A tensor
            that holds NaN or Inf is found when it is reached.

    Example:
        >>> jq.save("model.safetensors", {"w": jnp.ones((64, 32))})
        >>> model = jq.checkpoints.open("model.safetensors")
        >>> jq.checkpoints.quantize(model, jq.W8A8)
        {'w': QTensor(int8 64x32, scale (64, 1), float32)}
    """
    checkpoint, chosen = _chosen(checkpoint, rules, requantize)
    plans = {name: rule and rule.plan() for name, rule in chosen.items()}
    done: dict[str, Any] = {}
    with progress_bar(progress, len(plans)) as report:
        for name, plan in plans.items():
            where = _sharding_of(checkpoint, name, sharding)
            x = load(checkpoint.tensors, [name], where, dtype, None)[name]
            if plan is not None:
                _check_finite(name, x)
                x = _placed(_quantized(x, plan, stored_order(x, plan)), where)
            done[name] = x
            report(len(done), len(plans), name)
    return done


def write_quantized(
    path: str | os.PathLike,
    checkpoint: Checkpoint,
    rules: Rules,
    *,
    sharding: Shardings | Any = None,
    requantize: bool = False,
    metadata: Mapping[str, str] | Callable[[Report], Mapping[str, str]] | None = None,
    progress: Progress | bool | None = None,
) -> Report:
    """Quantizes a checkpoint into a file that `jaxquant.load` reads; neither has to fit in memory.

    Tensors are read, quantized and written in parts of some 16 million elements, where scales allow
    it: not one scale per tensor, and not nested scales. The file is that of `save` for the result
    of `quantize` on one device, byte for byte. A process that is killed leaves a folder
    `<path>.partial`, and the next call with the same checkpoint and rules goes on where it stopped.

    In several processes of `jax.distributed`, all call this with a sharding over all devices; the
    first process writes.

    Args:
        path: file to write, or to replace.
        checkpoint, rules, sharding, requantize, progress: as for `quantize`.
        metadata: your own strings, for `tree.read_metadata`; or a function of the report that
            returns them.

    Returns:
        The report, as from `tree.report`.

    Raises:
        OSError: the file cannot be written.
        ValueError: as for `quantize`, or another process is writing the file.

    Example:
        >>> jq.save("model.safetensors", {"w": jnp.ones((64, 32))})
        >>> model = jq.checkpoints.open("model.safetensors")
        >>> report = jq.checkpoints.write_quantized("small.safetensors", model, jq.W8A8)
        >>> jq.load("small.safetensors")
        {'w': QTensor(int8 64x32, scale (64, 1), float32)}
    """
    checkpoint, chosen = _chosen(checkpoint, rules, requantize)
    is_writer = jax.process_index() == 0
    writer = TreeWriter(path, _task(checkpoint, chosen)) if is_writer else None
    known = _shared({} if writer is None else writer.notes)
    rows = {name: _row_from_json(note) for name, note in known.items()}
    todo = [name for name in sorted(chosen) if name not in rows]
    try:
        with progress_bar(progress, len(chosen)) as report:
            for name in todo:
                where = _sharding_of(checkpoint, name, sharding)
                task = _Task(name, checkpoint[name].value, chosen[name], where, is_writer)
                rows[name] = task.write(writer, rules)
                report(len(rows), len(chosen), name)
        result = Report(tuple(rows[name] for name in sorted(rows)))
        if writer is not None:
            writer.finish(metadata(result) if callable(metadata) else metadata)
    finally:
        if writer is not None:
            writer.close()
    return result


@dataclasses.dataclass
class _Task:
    """One tensor that is read, quantized if its rule says so, and written in parts."""

    name: str
    value: Source | QTensor
    rule: Rule | None
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
        if self.plan is None:
            return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), self.value)
        scheme, axis = self.plan.scheme, self.plan.axis
        leaf: Any = jax.ShapeDtypeStruct(self.value.shape, self.value.dtype)
        q = jax.eval_shape(partial(quantize_array, axis=axis), leaf, scheme.weights)
        order = stored_order(leaf, self.plan)
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
        x = source.put(self.sharding if fits else _replicated(self.sharding))
        _check_finite(self.name, x)
        q = _quantized(x, self.plan, form.order)
        signal, noise, unit = (float(p) for p in powers(x, q))
        self.signal += signal * unit * unit
        self.noise += noise * unit * unit
        counts = histogram(q)
        self.codes = tuple(map(sum, zip(self.codes or (0,) * len(counts), counts, strict=True)))
        return q

    def _rows(self, form: Any) -> int:
        """Rows of a part: all of them, if parts would have other scales."""
        shape = self.value.shape
        if len(shape) < 2 or math.prod(shape) <= _PART:
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


def _sharding_of(checkpoint: Checkpoint, name: str, sharding: Any) -> Any:
    if isinstance(sharding, Mapping):
        return sharding[name]
    return sharding(name, checkpoint[name].shape) if callable(sharding) else sharding


def _chosen(
    checkpoint: Checkpoint, rules: Rules, requantize: bool
) -> tuple[Checkpoint, dict[str, Rule | None]]:
    """The rule of each tensor, all checked as far as headers tell, and what they are applied to."""
    if isinstance(rules, Scheme | ArrayConfig):
        rules = default_rules(rules, axis=-1)
    if not requantize:
        return checkpoint, _matched(checkpoint, rules)
    floats = {
        name: dataclasses.replace(stored, value=dequantized(name, stored.value))
        for name, stored in checkpoint.items()
        if isinstance(stored.value, QTensor) and _is_selected(name, stored.value, rules)
    }
    checkpoint = dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, **floats})
    return checkpoint, _matched(checkpoint, rules)


def _is_selected(name: str, value: Any, rules: Rules) -> bool:
    """Whether a rule quantizes a tensor that is stored quantized."""
    (rule,) = match_rules(as_rules(rules), [name], [value])
    return rule is not None and rule.plan() is not None


def _matched(checkpoint: Checkpoint, rules: Rules) -> dict[str, Rule | None]:
    values = {name: stored.value for name, stored in checkpoint.items()}

    def check(leaf: Any, plan: Plan) -> str | None:
        if isinstance(leaf, QTensor):
            return (
                f"stored quantized ({leaf!r}); give it a rule with None, which copies it, or "
                "requantize (requantize=True, --requantize), which dequantizes it first"
            )
        if plan.method is not None:
            return (
                f"its rule has the method {plan.method!r}, which tensors that are read in parts do "
                "not support; load it and call tree.quantize, or drop the method"
            )
        return why_unsupported_shape(leaf.shape, leaf.dtype, plan)

    names, leaves, *_ = select(values, rules, check)
    return dict(zip(names, match_rules(as_rules(rules), names, leaves), strict=True))


def _quantized(x: Any, plan: Plan, order: tuple[int, ...] | None) -> QTensor:
    q = quantize_in_order(x, plan, order)
    inputs = plan.scheme.inputs
    return q if inputs is None else dataclasses.replace(q, inputs=Inputs(inputs))


def _check_finite(name: str, x: Any) -> None:
    if not is_finite(x):
        raise ValueError(
            f"{name} holds NaN or Inf, shape {x.shape}; fix the checkpoint, or give it a rule with "
            "None."
        )


def _placed(q: QTensor, sharding: Any) -> QTensor:
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return q
    q = refine_blocks(q, sharding.spec, sharding.mesh)
    of_arrays = specs(q, sharding.spec, sharding.mesh)
    return jax.device_put(q, jax.tree.map(lambda spec: sharding.update(spec=spec), of_arrays))


def _devices_of_rows(sharding: Any) -> int:
    if not isinstance(sharding, jax.sharding.NamedSharding) or not sharding.spec:
        return 1
    return devices_of(sharding.spec[0], sharding.mesh)


def _divides(sharding: Any, shape: tuple[int, ...]) -> bool:
    return shape[0] % _devices_of_rows(sharding) == 0


def _replicated(sharding: Any) -> Any:
    """For the last rows, which the devices cannot share."""
    return sharding.update(spec=jax.P(None, *sharding.spec[1:]))


def _on_host(leaf: Any) -> Any:
    """The arrays of a leaf as NumPy arrays, whole in each process."""

    def whole(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, leaf)


def _shared(notes: dict[str, Any]) -> dict[str, Any]:
    """The notes of the process that writes, in all processes."""
    if jax.process_count() == 1:
        return dict(notes)
    text = np.frombuffer(json.dumps(notes).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(jnp.int32(text.size)))
    padded = np.resize(text, size) if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def _task(checkpoint: Checkpoint, chosen: dict[str, Rule | None]) -> str:
    """What identifies the work: the files and what is done with each tensor."""
    path = checkpoint.path
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    # Not the rules themselves: functions in them print their addresses.
    done = {name: None if rule is None else _as_json(rule) for name, rule in chosen.items()}
    return json.dumps([__version__, str(path.resolve()), stats, done])


def _as_json(rule: Rule) -> list[Any]:
    plan = rule.plan()
    configs = () if plan is None else (plan.scheme.weights, plan.scheme.inputs)
    return [rule.pattern, rule.note, plan and plan.axis, [c and config_to_json(c) for c in configs]]


def _row_from_json(row: dict[str, Any]) -> ReportRow:
    return ReportRow(**{**row, "shape": tuple(row["shape"]), "codes": tuple(row["codes"])})
