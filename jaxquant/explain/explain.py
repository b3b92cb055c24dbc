"""Which computation runs for each quantized product of a function, and why."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ..jaxprs import (
    Site,
    add_parts,
    add_slices,
    chips,
    device_count,
    is_mapped,
    is_narrow_float,
    is_partitioned,
    is_sliced,
    jit_name,
    marker_p,
    marking,
    name_stack,
    names_parts,
    parts_of,
    parts_of_arguments,
    split_arrays,
    user_line,
    walk,
)
from ..ops import Choice, Dequantization, Record, bytes_of, operations_of
from .estimates import estimated_speed
from .machines import Machine, machine_for
from .speeds import Measurement, measurement_for, speeds_near
from .table import DequantizedRow, Explanation, ExplanationRow

# Estimates below this are a warning; those of float32 itself are 1.
_SLOWER = 0.97


def explain(fn: Callable[..., Any], *args: Any, platform: str | None = None) -> Explanation:
    """Explains how each quantized product of fn(*args) is computed, and what that costs.

    Nothing is computed: `fn` is only traced. A product is a call of `dot_general`, `matmul`,
    `einsum`, `conv_general_dilated` or `ragged_dot` with a QTensor, also inside jit, loops, `vmap`,
    gradients and Keras layers. Rows do not include `take`, which does not multiply, or the float
    products that gradients consist of. Where XLA partitions the program among devices, by the
    shardings of `args`, a mesh or the program itself, rows say what runs there. In functions from
    `jaxquant.lift`, rows name the parameter, and each place that dequantizes one is listed, too.

    Args:
        fn: a function of arrays and pytrees of arrays, jitted or not.
        args: its arguments, or `jax.ShapeDtypeStruct`s in place of arrays. Leaves that are not
            arrays, such as the functions in a model that is a pytree, are passed on as they are.
        platform: "cpu", "tpu" or "gpu", or a machine: "v5e", "v6e", "h200". None for the default
            device. The machine need not be present.

    Returns:
        Explanation with one row per product. All branches of a `cond` are included.

    Raises:
        ValueError: `fn` is not a function, or the platform is not one of these.

    Example:
        >>> q = jq.quantize(jnp.ones((512, 8)), jq.ArrayConfig(), axis=0)
        >>> x = jax.ShapeDtypeStruct((2, 512), jnp.float32)
        >>> (row,) = jq.explain(jq.matmul, x, q, platform="tpu")
        >>> row.implementation, row.operations, row.bound
        ('scaled', 16384, 'memory')
    """
    if not callable(fn):
        raise ValueError(
            "explain expects a function and its arguments, as in explain(jq.matmul, x, q); got "
            f"{fn!r}."
        )
    machine = machine_for(platform)
    chip = _chip(platform, machine)
    found = list(_products(fn, args, machine.lowering))
    dequantized = [_dequantized_row(p) for p in found if isinstance(p.record, Dequantization)]
    found = [p for p in found if isinstance(p.record, Record)]
    measured = [measurement_for(machine.name, product.record.lhs.dtype) for product in found]
    rows = [_row(product, machine, chip, m) for product, m in zip(found, measured, strict=True)]
    used = [m for row, m in zip(rows, measured, strict=True) if m is not None and row.speeds]
    distinct = [m for i, m in enumerate(used) if m not in used[:i]]
    return Explanation(machine, tuple(distinct), tuple(rows), tuple(dequantized))


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product that was found in a program.

    Attributes:
        record: the Record of a product, or a Dequantization.
        parameter: path of the parameter in it, if a lifted function has it, else "".
        copies: copies that `vmap` made of the result, of lhs and of rhs.
        site: the location of its marker.
        is_sliced: whether an operand is a slice of integers of less than a byte, or of floats of 8
            bits or fewer in a loop.
        has_narrow_floats: whether an operand consists of such floats.
        is_partitioned: whether XLA divides it among devices.
        has_parts: whether each device may run a kernel on its part then.
        parts: into how many parts devices divide each stored axis of the right operand; None if
            that is not known.
    """

    record: Any
    parameter: str
    copies: tuple[int, int, int]
    site: Site
    is_sliced: bool
    has_narrow_floats: bool
    is_partitioned: bool
    has_parts: bool
    parts: tuple[int, ...] | None


def _products(fn, args, platform) -> Iterator[_Product]:
    """The products of a function on a platform, in order."""
    arrays, whole = split_arrays(args)
    with marking():
        program = jax.make_jaxpr(lambda arrays: fn(*whole(arrays)))(arrays)
    sliced, devices = frozenset(), device_count(program, args)
    parts = parts_of_arguments(program, arrays)
    for site in walk(program, platform):
        eqn = site.eqn
        if eqn.primitive is marker_p:
            is_divided = devices > 1 and is_partitioned(site)
            yield _Product(
                record=eqn.params["record"],
                parameter=eqn.params["parameter"],
                copies=eqn.params["copies"],
                site=site,
                is_sliced=is_sliced(eqn.invars, sliced),
                has_narrow_floats=any(is_narrow_float(v.aval) for v in eqn.invars),
                is_partitioned=is_divided,
                has_parts=names_parts(devices) and not is_mapped(site),
                parts=parts_of(eqn.invars[2], parts),
            )
        sliced, parts = add_slices(site, sliced), add_parts(eqn, parts)


def _row(
    product: _Product, machine: Machine, chip: str | None, measurement: Measurement | None
) -> ExplanationRow:
    record, choice = product.record, _choice(product, machine, chip)
    size, operations = bytes_of(record, product.copies), operations_of(record, product.copies)
    is_bound_by_memory = operations < size * machine.operations_per_byte(choice.is_integer)
    speeds = () if measurement is None else _speeds(product, choice, measurement)
    estimate = None if speeds else _estimate(product, choice, machine)
    trips = 1 if product.site.times is None else product.site.times
    return ExplanationRow(
        path=_path(product.site),
        parameter=product.parameter,
        line=_line(product.site),
        operation=record.operation,
        shapes=(record.lhs.shape, record.rhs.shape, record.shape),
        formats=_formats(record),
        implementation=choice.implementation,
        is_forced=record.is_forced,
        not_selected=choice.not_selected,
        is_integer=choice.is_integer,
        copies=product.copies[0],
        times=product.site.times,
        bytes=trips * size,
        operations=trips * operations,
        bound="memory" if is_bound_by_memory else "arithmetic",
        speeds=speeds,
        estimate=estimate,
        warning=_warning(product, choice, machine, speeds, measurement, estimate),
    )


def _dequantized_row(product: _Product) -> DequantizedRow:
    record = product.record
    trips = 1 if product.site.times is None else product.site.times
    return DequantizedRow(
        parameter=record.path,
        line=_line(product.site),
        primitive=record.primitive,
        why=record.why,
        times=product.site.times,
        bytes=trips * record.bytes,
    )


def _chip(platform: str | None, machine: Machine) -> str | None:
    """The chip that is explained: that of this process, unless another one is named."""
    here = chips.generation() if platform in (None, machine.platform) else None
    return here or machine.name


def _choice(product: _Product, machine: Machine, chip: str | None) -> Choice:
    """The choice for the chip, else for its platform, else for all others."""
    able = [c for c in product.record.choices if product.has_parts or not c.on_parts]
    # The first of several for partitioned programs is the one that runs.
    choices = {(c.platform, c.chip, c.is_partitioned): c for c in reversed(able)}
    targets = (machine.lowering, chip), (machine.lowering, None), (None, None)
    kinds = (True, False) if product.is_partitioned else (False,)
    keys = ((platform, chip, kind) for platform, chip in targets for kind in kinds)
    choice = next(choices[key] for key in keys if key in choices)
    return dict(choice.others_on_parts).get(product.parts or (), choice)


def _formats(record):
    """Both operands, each described as activations or as weights."""
    lhs, rhs = record.lhs, record.rhs
    return (lhs.inputs, rhs.weights) if rhs.is_quantized else (lhs.weights, rhs.inputs)


def _speeds(product, choice, measurement):
    record = product.record
    if record.rows is None or product.copies[0] > 1 or product.is_partitioned:
        return ()
    inputs = record.lhs.inputs if record.lhs.is_quantized else "float"
    key = (record.rhs.inputs, inputs, choice.implementation)
    lines = [s for s in measurement.speeds if (s.weights, s.inputs, s.implementation) == key]
    columns = math.prod(record.rhs.shape) // max(record.length, 1)
    return speeds_near(lines, (record.length, columns), record.rows)


def _estimate(product, choice, machine):
    if product.copies[0] > 1 or product.is_partitioned:
        return None
    return estimated_speed(product.record, choice, machine)


def _warning(product, choice, machine, speeds, measurement, estimate):
    """A warning if the product is slower than necessary, or None."""
    words = []
    # Computations that unpack codes copy them anyway, which costs as much as slicing.
    is_slow = product.is_sliced and not machine.slices_narrow
    if is_slow and (product.has_narrow_floats or choice.reads_packed):
        what = "slices 4-bit weights one element at a time"
        if product.has_narrow_floats:
            what = "converts the weights of all layers to wider floats before the loop"
        words.append(
            f"XLA {what}: use jaxquant.scan (without gradients), or keep the layers in separate "
            "arrays"
        )
    found = [speed for *_, speed in speeds]
    if found and min(found) < 1:
        verb = "is" if max(found) < 1 else "may be"
        source = ", by estimate" if measurement.is_estimate else ""
        words.append(f"{measurement.reference} {verb} faster{source}")
    if estimate is not None and estimate < _SLOWER:
        kind = "product" if product.record.convolution is None else "convolution"
        slow = f"this has {estimate:.2f} of its speed"
        words.append(f"XLA's float32 {kind} is faster, by estimate: {slow}")
    return "; ".join(words) or None


def _path(site):
    """Name scopes and jitted functions, from the outside in, without jaxquant's own function."""
    names = []
    for eqn in (*site.within, site.eqn):
        name = None if eqn is _own_call(site) else jit_name(eqn)
        names += [name_stack(eqn), f"jit({name})" if name else ""]
    return "/".join(filter(None, names))


def _own_call(site):
    """The equation of jaxquant's operation: the innermost jitted function around the marker.

    The outermost equation under `jax.disable_jit`.
    """
    inside_out = (*reversed(site.within), site.eqn)
    outermost = (*site.within, site.eqn)[0]
    return next((eqn for eqn in inside_out if jit_name(eqn) is not None), outermost)


def _line(site):
    """Where the innermost function that is not in a library called the operation.

    Lines inside of the operation are those of its first call, because it is traced only once.
    """
    file, _, line = user_line(_own_call(site)).rpartition(":")
    return f"{os.path.basename(file)}:{line}" if file else ""
