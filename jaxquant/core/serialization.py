"""JSON forms of configs and of the static fields of a QTensor, for files and `jax.export`.

Formats are saved with all their fields, so that custom formats load without being registered.
"""

import dataclasses
import json
from typing import Any

import jax.export
import jax.numpy as jnp

from .block_rotation import BlockRotation
from .config import ArrayConfig
from .formats import Format
from .qtensor import Inputs, QTensor
from .ranges import RANGES


def format_to_json(format: Format) -> dict[str, Any]:
    """A Format as JSON values."""
    return dataclasses.asdict(format)


def format_from_json(row: dict[str, Any]) -> Format:
    """Inverse of `format_to_json`."""
    return Format(**_with_tuples(row))


def config_to_json(config: ArrayConfig) -> dict[str, Any]:
    """An ArrayConfig as JSON values.

    Raises:
        ValueError: its range is not one of `RANGES`, so the config could not be loaded.
    """
    name = type(config.range).__name__
    if RANGES.get(name) is not type(config.range):
        raise ValueError(
            f"Only configs with the ranges {', '.join(RANGES)} can be saved; got "
            f"{config.range!r}. Add its class to RANGES in jaxquant/core/ranges.py."
        )
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    range_fields = {f.name: getattr(config.range, f.name) for f in dataclasses.fields(RANGES[name])}
    fields["range"] = {"name": name, **range_fields}
    return {**fields, "format": format_to_json(config.format)}


def config_from_json(row: dict[str, Any]) -> ArrayConfig:
    """Inverse of `config_to_json`.

    Older files also contain an `axis`. None meant one scale per tensor. Other values are ignored
    because the axis is now an argument of `quantize`.
    """
    fields = _with_tuples(row)
    if fields.pop("axis", 0) is None:
        fields["per_tensor"] = True
    parameters = dict(fields["range"])
    fields["range"] = RANGES[parameters.pop("name")](**parameters)
    return ArrayConfig(**{**fields, "format": format_from_json(fields["format"])})


def static_to_json(q: QTensor) -> dict[str, Any]:
    """Static fields of a QTensor as JSON values."""
    format = format_to_json(q.format)
    return {"format": format, "dtype": jnp.dtype(q.dtype).name, "order": q.order}


def static_from_json(row: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `static_to_json`: returns keyword arguments for QTensor.

    Raises:
        ValueError: `order` is not a permutation of the last axes.
    """
    fields = _with_tuples(row)
    format, dtype = format_from_json(fields["format"]), jnp.dtype(fields["dtype"])
    order = fields["order"]
    if order is not None and not _is_order(order):
        raise ValueError(
            f"order must permute the last axes, such as (-1, -2), or be None; got {order}."
        )
    return {"format": format, "dtype": dtype, "order": order}


def _is_order(order: Any) -> bool:
    """Whether this is a tuple of -1, -2, ... -n in some order."""
    if not isinstance(order, tuple) or not all(type(axis) is int for axis in order):
        return False
    return sorted(order) == list(range(-len(order), 0))


def _with_tuples(row: dict[str, Any]) -> dict[str, Any]:
    """Converts JSON lists to the tuples of the configs."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}


def _register(nodetype, to_bytes, from_bytes):
    jax.export.register_pytree_node_serialization(
        nodetype,
        serialized_name=f"jaxquant.{nodetype.__name__}",
        serialize_auxdata=to_bytes,
        deserialize_auxdata=from_bytes,
    )


def _dump(value):
    return json.dumps(value).encode()


# The auxiliary data of a registered dataclass is the tuple of its static fields, in order.
# The auxiliary data of a static node is the node itself.
_register(
    QTensor,
    lambda fields: _dump(static_to_json(_empty(fields))),
    lambda data: tuple(static_from_json(json.loads(data)).values()),
)
_register(
    Inputs,
    lambda fields: _dump(fields[0] and config_to_json(fields[0])),
    lambda data: (config_from_json(json.loads(data)) if json.loads(data) else None,),
)
_register(
    BlockRotation,
    lambda fields: _dump(fields[0]),
    lambda data: (json.loads(data),),
)
_register(
    ArrayConfig,
    lambda config: _dump(config_to_json(config)),
    lambda data: config_from_json(json.loads(data)),
)


def _empty(static: tuple[Any, ...]) -> Any:
    """A QTensor without arrays, from the tuple of its static fields."""
    names = [f.name for f in dataclasses.fields(QTensor) if f.metadata.get("static")]
    nothing: Any = None
    return QTensor(nothing, nothing, **dict(zip(names, static, strict=True)))
