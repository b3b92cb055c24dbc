"""Compiles programs for TPUs without a TPU and estimates their run time.

The compiler comes with libtpu. The estimate is the compiler's, not a measurement: operations one
after another, each as the longer of its cycles and its HBM traffic.
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

# Read by libtpu when it is loaded: do not query this machine, which does not have a TPU, and allow
# other processes to compile at the same time.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one device of a TPU generation.

    Attributes:
        topology: name of a small machine with such chips in `jax.experimental.topologies`.
        clock: cycles per second, the unit of the compiler's estimates.
        bandwidth: bytes per second of HBM.
        rates: operations per second by the kind of both operands; kinds without an entry are
            computed in bfloat16.
    """

    topology: str
    clock: float
    bandwidth: float
    rates: dict[str, float]

    def limit(self, moved: int, operations: int, arithmetic: str) -> float:
        """Seconds that no program can beat: the roofline."""
        rate = self.rates.get(arithmetic, self.rates["bf16"])
        return max(moved / self.bandwidth, operations / rate)


# Bandwidths and rates are Google's published figures, for TPU7x those of one of its two cores. The
# clock of TPU7x is not published: it is derived from its rate, as for the others, with four matrix
# units.
CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5e9, 819e9, {"bf16": 197e12, "int8": 394e12}),
    "v6e": Chip("v6e:2x2", 1.75e9, 1640e9, {"bf16": 918e12, "int8": 1836e12}),
    "TPU7x": Chip("TPU7x:2x2x1", 2.2e9, 3690e9, {"bf16": 1153e12, "fp8": 2307e12}),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The compiler's estimate for a program, not a measurement.

    Attributes:
        microseconds: of all operations with an estimate, one after another.
        hbm_bytes: bytes that they read and write.
        temporary_bytes: HBM beyond arguments and results.
        kernel_bytes, kernel_operations: counted for Pallas kernels, which have no estimate; they
            add bytes over bandwidth or operations over rate, whichever takes longer, to
            `microseconds`.
        kernel_runs: how often such kernels are called.
        is_whole: whether the trip counts of all loops are known; unknown ones count as one.
    """

    microseconds: float
    hbm_bytes: int
    temporary_bytes: int
    kernel_bytes: int
    kernel_operations: int
    kernel_runs: int
    is_whole: bool


def prepare() -> None:
    """Sets up the process for compilation only. Call it before JAX initializes its devices.

    Raises:
        SystemExit: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit(
            "The suite needs the TPU compiler, but libtpu is not installed. Run "
            "pip install -e '.[tpu]'."
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


@functools.cache
def device(chip: str) -> Any:
    """A device of the chip, to compile for, after `prepare`.

    Raises:
        RuntimeError: libtpu is missing or incompatible with this JAX.
    """
    topology = CHIPS[chip].topology
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]


def compile_for(chip: str, run: Callable, *args: Any) -> jax.stages.Compiled:
    """Compiles run(*args) for a chip; args are pytrees of arrays or shapes."""
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
        kernel_runs=sum(w.times for w in kernels),
        is_whole=all(w.trips_are_known for w in works),
    )


def seconds(chip: Chip, work: Work) -> float:
    """The longer of compute time and transfer time, for one run of an operation."""
    computing = (work.cycles or 0) / chip.clock
    multiplying = (work.operations or 0) / chip.rates["bf16"]
    return max(computing, multiplying, work.hbm_bytes / chip.bandwidth)
