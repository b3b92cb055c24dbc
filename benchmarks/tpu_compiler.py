"""Compiles for TPUs that are not there, and estimates how long the programs would take.

libtpu brings the compiler. The estimate is the compiler's, not a measurement: operations one after
another, each the longer of its cycles and of its traffic with HBM.
"""

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

from .tpu_text import Program, Work

# What libtpu reads when it is loaded: not to ask for the machine it runs on, which has no TPU, and
# that another process may compile at the same time.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device of a TPU generation can do at most.

    Attributes:
        topology: as `jax.experimental.topologies` names a small machine of such chips.
        clock: cycles per second that the compiler's estimates are in.
        bandwidth: bytes per second of HBM.
        rates: multiplications and additions per second by the kind of both operands; kinds
            without an entry are computed in bfloat16.
    """

    topology: str
    clock: float
    bandwidth: float
    rates: dict[str, float]

    def limit(self, moved: int, operations: int, arithmetic: str) -> float:
        """Seconds that no program can beat: the roofline."""
        rate = self.rates.get(arithmetic, self.rates["bf16"])
        return max(moved / self.bandwidth, operations / rate)


# Bandwidths and rates as Google publishes them, those of TPU7x for one of its two cores. The clock
# of TPU7x is not published; it follows from its rate as those of the others do: four matrix units.
CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5e9, 819e9, {"bf16": 197e12, "int8": 394e12}),
    "v6e": Chip("v6e:2x2", 1.75e9, 1640e9, {"bf16": 918e12, "int8": 1836e12}),
    "TPU7x": Chip("TPU7x:2x2x1", 2.2e9, 3690e9, {"bf16": 1153e12, "fp8": 2307e12}),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The compiler's estimate of a program. Not a measurement.

    Attributes:
        microseconds: of all operations, one after another, as far as the compiler estimates.
        hbm_bytes: that they read and write.
        temporary_bytes: of HBM, beyond arguments and results.
        kernel_bytes, kernel_operations: a count of what Pallas kernels do, of which there is
            no estimate; their share of `microseconds` is bytes over bandwidth or operations
            over rate, whichever takes longer.
        is_whole: whether the trips of all loops are known; if not, one is counted.
    """

    microseconds: float
    hbm_bytes: int
    temporary_bytes: int
    kernel_bytes: int
    kernel_operations: int
    is_whole: bool


def prepare() -> None:
    """Sets up the process for compiling only. Before JAX looks for devices.

    Raises:
        SystemExit: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit(
            "The suite tpu-compile needs the compiler for TPUs, and found none. Install it by "
            "pip install -e '.[tpu]'."
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


@functools.cache
def device(chip: str) -> Any:
    """A device of the chip, to compile for, after `prepare`.

    Raises:
        RuntimeError: libtpu is not there, or another one than this JAX can use.
    """
    topology = CHIPS[chip].topology
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]


def compile_for(chip: str, run: Callable, *args: Any) -> jax.stages.Compiled:
    """Compiles run(*args) for a chip; args are pytrees of arrays or their shapes."""
    sharding = jax.sharding.SingleDeviceSharding(device(chip))

    def placed(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.jit(run).lower(*jax.tree.map(placed, args)).compile()


def estimate(chip: str, compiled: jax.stages.Compiled) -> Estimate:
    """Adds up the operations of a program.

    Raises:
        Exception: the program cannot be read back as text, which happens for TPU7x.
    """
    works = Program(compiled.as_text() or "").work()
    memory = compiled.memory_analysis()
    kernels = [w for w in works if w.is_kernel]
    return Estimate(
        microseconds=1e6 * sum(w.times * seconds(CHIPS[chip], w) for w in works),
        hbm_bytes=sum(w.times * w.hbm_bytes for w in works),
        temporary_bytes=0 if memory is None else memory.temp_size_in_bytes,
        kernel_bytes=sum(w.times * w.hbm_bytes for w in kernels),
        kernel_operations=sum(w.times * (w.operations or 0) for w in kernels),
        is_whole=all(w.trips_are_known for w in works),
    )


def seconds(chip: Chip, work: Work) -> float:
    """The longer of computing and of moving bytes, for one run of an operation."""
    computing = (work.cycles or 0) / chip.clock
    if work.operations:
        computing = work.operations / chip.rates["bf16"]
    return max(computing, work.hbm_bytes / chip.bandwidth)
