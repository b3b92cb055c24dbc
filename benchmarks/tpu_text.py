"""Parses the text of a program compiled for a TPU and lists the work it does.

The text lists computations, each with its operations in execution order. A fusion carries the
compiler's estimated cycles, which leave out waiting for memory. Arrays whose layout says `S(1)` are
in on-chip memory; all others are read from or written to HBM.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Bits per element, from the name of the type: s4, bf16, f8e4m3fn, pred.
_BITS = re.compile(r"[a-z]+(\d+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_FLOPS = re.compile(r'"cost_estimate":\{[^}]*"flops":"?(\d+)')
_ACCESSED = re.compile(r'"cost_estimate":\{[^}]*"bytes_accessed":"?(\d+)')
# Views and bookkeeping, which do not move data; `-done` waits for what `-start` moved.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_SLICES = {"slice", "dynamic-slice", "gather"}
# Operations that change their first operand in place, and the operand that is written.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
# Inside fusions, which copy only what their result needs.
_VIEWS = {"parameter", "bitcast", "copy"}
# Cycles per element of 8-bit floats that a kernel converts to bfloat16: by its scheduled
# instructions (`python -m benchmarks.pallas_tpu --experts`), of v5e and of v6e.
_CONVERSION = 2 / 1024


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in the text.

    Attributes:
        dtype: name in the text: s8, bf16.
        shape: its dimensions.
        is_on_chip: whether it is in on-chip memory instead of HBM.
    """

    dtype: str
    shape: tuple[int, ...]
    is_on_chip: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of its elements without padding; 4-bit elements take half a byte."""
        found = _BITS.match(self.dtype)
        return -(-self.size * int(found[1] if found else 8) // 8)

    @property
    def hbm_bytes(self) -> int:
        """Bytes in HBM."""
        return 0 if self.is_on_chip else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation: result, opcode, names of the operands, and the rest as text.

    `is_root` marks the instruction that returns the computation's result.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool = False

    def called(self, attribute: str) -> list[str]:
        """Names of the computations that an attribute (calls, body, condition) holds."""
        found = re.search(rf"\b{attribute}=\{{?(%[^,}} ]+(?:, ?%[^,}} ]+)*)", self.attributes)
        return re.findall(r"%([^,} ]+)", found[1]) if found else []


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one scheduled operation.

    Attributes:
        name, opcode: as in the text.
        cycles: the compiler's estimate, without waiting for HBM; None where it has none. Of a
            Pallas kernel, those of converting the floats of 8 bits that it reads.
        hbm_bytes: read from and written to HBM.
        times: how often it runs.
        operations: multiplications and additions that a Pallas kernel declares; None for
            operations that the compiler generates.
        is_kernel: whether it is a Pallas kernel, which the compiler does not estimate.
        trips_are_known: False inside a loop with an unknown trip count, which counts as one
            trip.
    """

    name: str
    opcode: str
    cycles: int | None
    hbm_bytes: int
    times: int = 1
    operations: int | None = None
    is_kernel: bool = False
    trips_are_known: bool = True


class Program:
    """A compiled program.

    Attributes:
        computations: instructions by name, in order, per computation.
        entry: name of the entry computation.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            header = _HEADER.match(line)
            found = _INSTRUCTION.match(line)
            if header:
                current = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else self.entry
            elif found:
                current[found[2]] = parse_instruction(found[2], found[3], bool(found[1]))
        if not self.entry:
            raise ValueError(f"The text must have an ENTRY computation; got {text[:80]!r}.")

    def work(self) -> list[Work]:
        """Everything that runs, in order. A loop's body appears once, with its trip count."""
        return list(self._work_of(self.entry, 1, True))

    def scheduled(self) -> Iterator[tuple[dict[str, Instruction], Instruction]]:
        """Each instruction outside of fusions, with the computation that it belongs to."""
        names = [self.entry]
        for name in names:
            for instruction in self.computations[name].values():
                yield self.computations[name], instruction
                for attribute in ("body", "condition", "branch_computations", "to_apply"):
                    names += [n for n in instruction.called(attribute) if n not in names]

    def _work_of(self, name: str, times: int, known: bool) -> Iterator[Work]:
        computation = self.computations[name]
        for instruction in computation.values():
            if instruction.opcode == "while":
                trips = self.trips(instruction)
                yield from self._work_of(
                    instruction.called("body")[0], times * (trips or 1), known and trips is not None
                )
            elif instruction.opcode == "call":
                yield from self._work_of(instruction.called("to_apply")[0], times, known)
            elif instruction.opcode == "conditional":
                branches = instruction.called("branch_computations")
                yield from max(
                    (list(self._work_of(b, times, known)) for b in branches),
                    key=lambda works: sum(w.hbm_bytes * w.times for w in works),
                )
            elif instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
                yield self._one(computation, instruction, times, known)

    def _one(self, computation, instruction, times, known):
        cycles = _CYCLES.search(instruction.attributes)
        is_kernel = 'custom_call_target="tpu_custom_call"' in instruction.attributes
        flops = _FLOPS.search(instruction.attributes) if is_kernel else None
        moved = self._hbm_bytes(computation, instruction)
        dtypes = {a.dtype for name in instruction.operands for a in computation[name].arrays}
        converts = is_kernel and any(dtype.startswith("f8") for dtype in dtypes)
        return Work(
            instruction.name,
            instruction.opcode,
            int(cycles[1]) if cycles else int(moved * _CONVERSION) if converts else None,
            moved,
            times,
            int(flops[1]) if flops else None,
            is_kernel,
            known,
        )

    def trips(self, loop: Instruction) -> int | None:
        """The trip count of a loop, or None if the text does not show it.

        Either the compiler annotates it, or the condition compares a counter, which JAX's loops
        start at 0, with a constant.
        """
        noted = _TRIPS.search(loop.attributes)
        if noted:
            return int(noted[1])
        condition = self.computations[loop.called("condition")[0]]
        constants = [
            int(i.attributes.split(")")[0])
            for i in condition.values()
            if i.opcode == "constant" and i.arrays[0].dtype in ("s32", "u32")
        ]
        is_counter = any("direction=LT" in i.attributes for i in condition.values())
        return constants[0] if is_counter and len(constants) == 1 else None

    def _hbm_bytes(self, computation, instruction) -> int:
        operands = [computation[name].arrays for name in instruction.operands]
        if instruction.opcode.endswith("-start"):
            return _moved(operands[0][0], instruction.arrays)
        called = instruction.called("calls")
        if instruction.opcode == "fusion":
            fused = called[0]
            read = [self._read(fused, i, a) for i, arrays in enumerate(operands) for a in arrays]
            return sum(read) + self._written(fused, instruction)
        if instruction.opcode in _SLICES:
            return 2 * sum(a.hbm_bytes for a in instruction.arrays)
        if instruction.opcode in _UPDATES:
            # In place: what cannot be is copied by another instruction before.
            (update,) = operands[_UPDATES[instruction.opcode]]
            return update.hbm_bytes + update.bytes * (not operands[0][0].is_on_chip)
        arrays = [a for arrays in operands for a in arrays]
        whole = sum(a.hbm_bytes for a in (*arrays, *instruction.arrays))
        # A kernel may read a part of an operand, such as the experts of one layer.
        accessed = _ACCESSED.search(instruction.attributes)
        return min(whole, int(accessed[1])) if accessed else whole

    def _read(self, fused: str, number: int, array: Array) -> int:
        """Bytes that a fusion reads of one operand: only the slices if it only slices it."""
        if array.is_on_chip:
            return 0
        sliced = self._sliced(fused, number)
        return array.bytes if sliced is None else min(array.bytes, sliced)

    def _sliced(self, fused: str, number: int) -> int | None:
        """Bytes of the slices of a parameter; None if it has other users."""
        computation = self.computations[fused]
        total = 0
        for user, position in self._users(fused, _parameter(computation, number)):
            if user.opcode in _SLICES and position == 0:
                total += user.arrays[0].bytes
            elif user.opcode == "fusion":
                inner = self._sliced(user.called("calls")[0], position)
                if inner is None:
                    return None
                total += inner
            elif user.opcode not in _UPDATES or position:
                return None
        return total

    def _users(self, name: str, value: str) -> Iterator[tuple[Instruction, int]]:
        """Instructions that use a value or a view of it, and the operand's position."""
        for user in self.computations[name].values():
            for position, operand in enumerate(user.operands):
                if operand == value and self._is_view(user) and not user.is_root:
                    yield from self._users(name, user.name)
                elif operand == value:
                    yield user, position

    def _is_view(self, instruction: Instruction) -> bool:
        """Whether an instruction inside a fusion only reshapes its operand, or lays it out anew."""
        if instruction.opcode != "fusion":
            return instruction.opcode in _VIEWS
        fused = self.computations[instruction.called("calls")[0]]
        return all(i.opcode in _VIEWS for i in fused.values())

    def _written(self, fused: str, instruction: Instruction) -> int:
        """Bytes that a fusion writes: only the update if it updates an array in place."""
        computation = self.computations[fused]
        updates = [i for i in computation.values() if i.opcode in _UPDATES]
        written = sum(a.hbm_bytes for a in instruction.arrays)
        if not updates or any(a.is_on_chip for a in instruction.arrays):
            return written
        operands = [computation[i.operands[_UPDATES[i.opcode]]] for i in updates]
        update = sum(operand.arrays[0].bytes for operand in operands)
        return min(written, update)


@functools.cache
def parse_arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type: one, or those of a (nested) tuple in order."""
    return tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), "S(" in layout)
        for dtype, shape, layout in _ARRAY.findall(text)
    )


def parse_instruction(name: str, text: str, is_root: bool = False) -> Instruction:
    """Parses what follows `name =`: a type, the opcode, operands in brackets, attributes."""
    opcode = _OPCODE.search(" " + text)
    if opcode is None:
        raise ValueError(f"An instruction must have an opcode before a bracket; got {text!r}.")
    before, after = text[: opcode.start()], text[opcode.end() - 1 :]
    inside = after.partition(")")[0]
    operands = tuple(re.findall(r"%([^,\s)]+)", inside))
    return Instruction(name, parse_arrays(before), opcode[1], operands, after, is_root)


def _parameter(computation, number):
    return next(
        i.name
        for i in computation.values()
        if i.opcode == "parameter" and i.attributes.startswith(f"{number})")
    )


def _moved(source: Array, results: tuple[Array, ...]) -> int:
    """Bytes of HBM that an asynchronous copy reads and writes.

    Its result lists destination, source and a scalar; a copy of a slice is as large as the
    destination. If both look alike, it is a copy from HBM to HBM.
    """
    destination = next((a for a in results if a.shape and a != source), source)
    size = min(source.bytes, destination.bytes)
    return size * ((not source.is_on_chip) + (not destination.is_on_chip))
