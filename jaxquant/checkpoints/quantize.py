"""Quantizes checkpoints that do not fit in memory, tensor by tensor and in parts of tensors."""

import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ..core import (
    ArrayConfig,
    QTensor,
    Scheme,
    config_to_json,
    refine_blocks,
    specs,
)
from ..tree import Progress, Report, ReportRow, Rule, Rules, default_rules
from ..tree.internal import (
    Plan,
    TreeWriter,
    as_rules,
    check_statistics,
    match_rules,
    progress_bar,
    select,
    stored_order,
    why_unsupported_shape,
)
from ..version import __version__
from .checkpoint import Checkpoint
from .dequantized import dequantized
from .load import Shardings, load
from .tensor_task import TensorTask, check_finite, quantized, whole


def quantize(
    checkpoint: Checkpoint,
    rules: Rules,
    *,
    method: Any = None,
    statistics: Mapping[str, Any] | None = None,
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
        rules: as for `tree.quantize`. For a Scheme or ArrayConfig the contracted axis is the last,
            as Hugging Face and GGUF store kernels (out, in).
        method, statistics: as for `tree.quantize`, by the names of tensors. A tensor with a method
            is whole on each device.
        sharding, dtype: as for `Checkpoint.load`; a tree of shardings is a dict by name.
        requantize: whether tensors that are stored quantized and have a rule are dequantized and
            quantized again; otherwise they are an error.
        progress: as for `tree.quantize`.

    Returns:
        A dict by name, of arrays and QTensors.

    Raises:
        ValueError: as for `tree.quantize` and `Checkpoint.load`. A tensor that holds NaN or Inf is
            found when it is reached.

    Example:
        >>> jq.save("model.safetensors", {"w": jnp.ones((64, 32))})
        >>> model = jq.checkpoints.open("model.safetensors")
        >>> jq.checkpoints.quantize(model, jq.W8A8)
        {'w': QTensor(int8 64x32, scale (64, 1), float32)}
    """
    statistics = statistics or {}
    checkpoint, chosen = _chosen(checkpoint, rules, requantize, method, statistics)
    plans = {name: rule and rule.plan() for name, rule in chosen.items()}
    done: dict[str, Any] = {}
    with progress_bar(progress, len(plans)) as report:
        for name, plan in plans.items():
            where = _sharding_of(checkpoint, name, sharding)
            of_parts = whole(where) if plan and plan.method else where
            x = load(checkpoint.tensors, [name], of_parts, dtype, None)[name]
            if plan is not None:
                check_finite(name, x)
                x = quantized(name, x, plan, stored_order(x, plan), statistics)
                x = _placed(x, where)
            done[name] = x
            report(len(done), len(plans), name)
    return done


def write_quantized(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    rules: Rules,
    *,
    method: Any = None,
    statistics: Mapping[str, Any] | None = None,
    sharding: Shardings | Any = None,
    requantize: bool = False,
    metadata: Mapping[str, str] | Callable[[Report], Mapping[str, str]] | None = None,
    progress: Progress | bool | None = None,
) -> Report:
    """Quantizes a checkpoint into a file that `jaxquant.load` reads; neither has to fit in memory.

    Tensors are read, quantized and written in parts of some 16 million elements, but whole if they
    have one scale per tensor, nested scales, or a method. The file is that of `save` for the result
    of `quantize` on one device, byte for byte. A process that is killed leaves a folder
    `<path>.partial`, and the next call with the same checkpoint, rules and statistics goes on where
    it stopped.

    In several processes of `jax.distributed`, all call this with a sharding over all devices; the
    first process writes.

    Args:
        path: file to write, or to replace.
        checkpoint, rules, method, statistics, sharding, requantize, progress: as for `quantize`.
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
    statistics = statistics or {}
    checkpoint, chosen = _chosen(checkpoint, rules, requantize, method, statistics)
    is_writer = jax.process_index() == 0
    writer = TreeWriter(path, _task(checkpoint, chosen, statistics)) if is_writer else None
    known = _shared({} if writer is None else writer.notes)
    rows = {name: _row_from_json(note) for name, note in known.items()}
    todo = [name for name in sorted(chosen) if name not in rows]
    try:
        with progress_bar(progress, len(chosen)) as report:
            for name in todo:
                where = _sharding_of(checkpoint, name, sharding)
                value = checkpoint[name].value
                task = TensorTask(name, value, chosen[name], statistics, where, is_writer)
                rows[name] = task.write(writer, rules)
                report(len(rows), len(chosen), name)
        result = Report(tuple(rows[name] for name in sorted(rows)))
        if writer is not None:
            writer.finish(metadata(result) if callable(metadata) else metadata)
    finally:
        if writer is not None:
            writer.close()
    return result


def _sharding_of(checkpoint: Checkpoint, name: str, sharding: Any) -> Any:
    if isinstance(sharding, Mapping):
        return sharding[name]
    return sharding(name, checkpoint[name].shape) if callable(sharding) else sharding


def _chosen(
    checkpoint: Checkpoint,
    rules: Rules,
    requantize: bool,
    method: Any,
    statistics: Mapping[str, Any],
) -> tuple[Checkpoint, dict[str, Rule | None]]:
    """The rule of each tensor, all checked as far as headers tell, and what they are applied to."""
    if isinstance(rules, Scheme | ArrayConfig):
        rules = default_rules(rules, axis=-1)
    rules = tuple(dataclasses.replace(r, method=r.method or method) for r in as_rules(rules))
    if not requantize:
        return checkpoint, _matched(checkpoint, rules, statistics)
    floats = {
        name: dataclasses.replace(stored, value=dequantized(name, stored.value))
        for name, stored in checkpoint.items()
        if isinstance(stored.value, QTensor) and _is_selected(name, stored.value, rules)
    }
    checkpoint = dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, **floats})
    return checkpoint, _matched(checkpoint, rules, statistics)


def _is_selected(name: str, value: Any, rules: Rules) -> bool:
    """Whether a rule quantizes a tensor that is stored quantized."""
    (rule,) = match_rules(as_rules(rules), [name], [value])
    return rule is not None and rule.plan() is not None


def _matched(
    checkpoint: Checkpoint, rules: tuple[Rule, ...], statistics: Mapping[str, Any]
) -> dict[str, Rule | None]:
    values = {name: stored.value for name, stored in checkpoint.items()}

    def check(leaf: Any, plan: Plan) -> str | None:
        if isinstance(leaf, QTensor):
            return (
                f"stored quantized ({leaf!r}); give it a rule with None, which copies it, or "
                "requantize (requantize=True, --requantize), which dequantizes it first"
            )
        return why_unsupported_shape(leaf.shape, leaf.dtype, plan)

    names, leaves, plans, _ = select(values, rules, check)
    check_statistics(names, plans, statistics)
    return dict(zip(names, match_rules(rules, names, leaves), strict=True))


def _placed(q: QTensor, sharding: Any) -> QTensor:
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return q
    q = refine_blocks(q, sharding.spec, sharding.mesh)
    of_arrays = specs(q, sharding.spec, sharding.mesh)
    return jax.device_put(q, jax.tree.map(lambda spec: sharding.update(spec=spec), of_arrays))


def _shared(notes: dict[str, Any]) -> dict[str, Any]:
    """The notes of the process that writes, in all processes."""
    if jax.process_count() == 1:
        return dict(notes)
    text = np.frombuffer(json.dumps(notes).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(jnp.int32(text.size)))
    padded = np.resize(text, size) if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def _task(
    checkpoint: Checkpoint, chosen: dict[str, Rule | None], statistics: Mapping[str, Any]
) -> str:
    """What identifies the work: the files, what is done with each tensor, and the statistics."""
    path = checkpoint.path
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    # Not the rules themselves: functions in them print their addresses.
    done = {name: None if rule is None else _as_json(rule) for name, rule in chosen.items()}
    return json.dumps([__version__, str(path.resolve()), stats, done, _checksums(statistics)])


def _checksums(statistics: Mapping[str, Any]) -> dict[str, list[int]]:
    return {
        name: [zlib.crc32(np.asarray(x).tobytes()) for x in jax.tree.leaves(list(kinds.values()))]
        for name, kinds in statistics.items()
    }


def _as_json(rule: Rule) -> list[Any]:
    plan = rule.plan()
    configs = () if plan is None else (plan.scheme.weights, plan.scheme.inputs)
    done = [c and config_to_json(c) for c in configs]
    return [rule.pattern, rule.note, plan and plan.axis, done, repr(plan and plan.method)]


def _row_from_json(row: dict[str, Any]) -> ReportRow:
    return ReportRow(**{**row, "shape": tuple(row["shape"]), "codes": tuple(row["codes"])})
