"""The configuration of compressed-tensors: which modules are quantized, and how."""

import dataclasses
import re

from ...core import FP8_E4M3, INT4, INT8, MXFP8, ArrayConfig, Format
from .fields import Fields

# Formats, and whether they can be read.
FORMATS = {
    "dense": True,
    "int-quantized": True,
    "float-quantized": True,
    "naive-quantized": True,
    "pack-quantized": True,
    "nvfp4-pack-quantized": True,
    "mxfp4-pack-quantized": True,
    "mxfp8-quantized": True,
    "mixed-precision": True,
    "sparse-bitmask": False,
    "sparse-24-bitmask": False,
    "marlin-24": False,
    "mxfp6-pack-quantized": False,
}
# Which elements share a scale, and whether weights may be quantized in this way.
_STRATEGIES = {
    "tensor": True,
    "channel": True,
    "group": True,
    "tensor_group": True,
    "block": True,
    "token": False,
    "attn_head": False,
}
_ORDERS = {"weight": False, "static": False, "group": True, "dynamic": True, None: False}
_TYPES = {"int": True, "float": False}
_DYNAMIC = (True, False, "local", None)
# The first version whose packed codes are dense.
_FIRST_DENSE = (0, 17)
_MAX_PATTERN = 500
_MAX_REPEATS = 6
# Formats of activations by whether they are integers, bits, and group size (None: any).
_ACTIVATIONS: dict[tuple, Format] = {
    (True, 8, None): INT8,
    (True, 4, None): INT4,
    (False, 8, None): FP8_E4M3,
    (False, 8, 32): MXFP8,
}


@dataclasses.dataclass(frozen=True)
class Args:
    """How one array is quantized: QuantizationArgs.

    Attributes:
        bits: per code.
        is_integer: whether the codes are integers.
        symmetric: whether zero points are absent.
        strategy: which elements share a scale.
        group_size: elements per scale along the last axis, for groups.
        block: rows and columns per scale, for blocks.
        dynamic: whether scales are computed when the model runs.
        reorders: whether the groups may be in any order.
    """

    bits: int
    is_integer: bool
    symmetric: bool
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    dynamic: bool
    reorders: bool

    def blocks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Block shape of a weight."""
        *batch, rows, columns = shape
        row_column = {
            "tensor": (rows, columns),
            "channel": (1, columns),
            "group": (1, self.group_size or columns),
            "tensor_group": (1, self.group_size or columns),
            "block": self.block or (rows, columns),
        }[self.strategy]
        return (*(1 for _ in batch), *row_column)


@dataclasses.dataclass(frozen=True)
class Group:
    """Modules that are quantized alike.

    Attributes:
        targets: names of modules or of their classes; patterns start with "re:".
        weights: how weights are quantized.
        inputs: how activations are quantized; None for not at all.
        has_outputs: whether the results of the modules are quantized, too.
        fields: of the file, for error messages.
        splits_codes: whether packed codes may lie in two words, as the version of the file says.
    """

    targets: tuple[str, ...]
    weights: Args
    inputs: Args | None
    has_outputs: bool
    fields: Fields
    splits_codes: bool


def read_groups(fields: Fields) -> list[Group]:
    """The groups of a `quantization_config`.

    Raises:
        ValueError: a field is malformed, or asks for what cannot be read.
    """
    _check_readable(fields)
    groups = fields.section("config_groups")
    version = re.match(r"(\d{1,4})\.(\d{1,4})", fields.text("version"))
    splits_codes = version is None or tuple(map(int, version.groups())) >= _FIRST_DENSE
    found = [_read_group(groups, name, splits_codes) for name in groups.values]
    if not found:
        raise fields.invalid("config_groups", "a table with at least one group of modules")
    return found


def _check_readable(fields: Fields) -> None:
    sparsity = fields.section("sparsity_config")
    for section in (fields, sparsity):
        name = section.one_of("format", FORMATS, "dense")
        if not FORMATS[name]:
            raise section.invalid(
                "format",
                "one that can be read: not sparse, and not of 6-bit floats. Decompress the model "
                "with compressed-tensors and save it dense",
            )
    if fields.section("transform_config").values:
        raise fields.invalid(
            "transform_config",
            "absent, because transforms of activations (QuIP, SpinQuant) are not supported. Choose "
            "a model that was quantized without them",
        )


def _read_group(groups: Fields, name: str, splits_codes: bool) -> Group:
    group = groups.section(name)
    group_format = group.one_of("format", FORMATS, "dense")
    if not FORMATS[group_format]:
        raise group.invalid("format", "one that can be read. Save the model dense")
    if not group.section("weights").values:
        raise group.invalid(
            "weights", "an object: modules whose weights are in float have no group"
        )
    weights = _read_args(group.section("weights"))
    if not _STRATEGIES[weights.strategy]:
        raise group.section("weights").invalid("strategy", "one for weights, such as channel")
    inputs = group.section("input_activations")
    targets = group.strings("targets")
    for target in targets:
        check_pattern(group, "targets", target)
    activations = _read_args(inputs) if inputs.values else None
    has_outputs = bool(group.section("output_activations").values)
    return Group(targets, weights, activations, has_outputs, group, splits_codes)


def _read_args(fields: Fields) -> Args:
    block = fields.pair("block_structure", None)
    dynamic = fields.values.get("dynamic")
    if not any(type(dynamic) is type(d) and dynamic == d for d in _DYNAMIC):
        raise fields.invalid("dynamic", 'true, false or "local"')
    group_size = fields.group_size(default=None)
    # Without a strategy, the group size implies it: null means per tensor.
    default = {None: "tensor", -1: "channel"}.get(group_size, "group")
    order = fields.one_of("actorder", [k for k in _ORDERS if k], None)
    strategy = fields.one_of("strategy", _STRATEGIES, "block" if block else default)
    if "group" in strategy and (group_size or -1) < 0:
        raise fields.invalid("group_size", f"a positive integer for the strategy {strategy}")
    if strategy.startswith("block") and not block:
        raise fields.invalid("block_structure", "two integers for the strategy block")
    return Args(
        bits=fields.integer("num_bits", 2, 8, 8),
        is_integer=_TYPES[fields.one_of("type", _TYPES, "int")],
        symmetric=fields.flag("symmetric", True),
        strategy=strategy,
        group_size=group_size,
        block=block,
        dynamic=bool(dynamic),
        reorders=_ORDERS[order],
    )


def check_pattern(group: Fields, key: str, target: str) -> None:
    """Raises for patterns ("re:...") that could take forever to match: files are not trusted.

    Raises:
        ValueError: it is not valid, too long, or repeats too much.
    """
    if not target.startswith("re:"):
        return
    nested = re.search(r"[*+}][^()]*\)\s*[*+{]", target)
    repeats = len(re.findall(r"[*+{]", target))
    try:
        re.compile(target[3:])
    except (re.error, OverflowError, RecursionError) as error:
        raise group.invalid(key, f"valid patterns ({error} in {target[:100]!r})") from error
    if nested or repeats > _MAX_REPEATS or len(target) > _MAX_PATTERN:
        raise group.invalid(
            key,
            f"patterns of at most {_MAX_PATTERN} characters with at most {_MAX_REPEATS} repeats, "
            "none within another",
        )


def group_of(groups: list[Group], module: str) -> Group | None:
    """The group of a module: by its name first, then by its class. None if several would do."""
    if len(groups) == 1:
        return groups[0]
    named = [g for g in groups if any(names_module(target, module) for target in g.targets)]
    if named:
        return named[0]
    kind = "Embedding" if "embed" in module else "Linear"
    by_class = [g for g in groups if kind in g.targets]
    return by_class[0] if by_class else None


def names_module(target: str, module: str) -> bool:
    """Whether a target is the name of a module, or a pattern that matches its start."""
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == module


def activations(args: Args | None, columns: int) -> ArrayConfig | None:
    """How activations are quantized; None to leave them in float.

    Activations of 4-bit floats, and groups that do not divide the columns, are left in float.
    """
    if args is None or columns % (args.group_size or 1):
        return None
    size = args.group_size if args.strategy.endswith("group") else None
    key = (args.is_integer, args.bits)
    format = _ACTIVATIONS.get((*key, size)) or _ACTIVATIONS.get((*key, None))
    if format is None or (size is None and args.strategy.startswith("attn")):
        return None
    return ArrayConfig(
        format=format,
        group_size=None if format.group_size else size,
        per_tensor=args.strategy == "tensor",
        symmetric=args.symmetric or not format.rounds,
    )
