"""Peak rates of machines, for the estimates of `explain`. One row per machine."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates that bound a product.

    Attributes:
        name: as `explain(platform=...)` names it.
        platform: as `jax.default_backend()` names it.
        lowering: the platform as `jax.lax.platform_dependent` names it.
        kind: part of `Device.device_kind`.
        bytes_per_second: of its memory.
        integer_per_second, float_per_second: multiplications and additions in int8, and in the
            floating-point dtype of products (bfloat16 on TPU and GPU, float32 on CPU).
        source: where the figures come from.
        slices_narrow: whether arrays of 4-bit integers, and of floats of 8 bits or fewer in loops,
            are sliced as fast as others.
    """

    name: str
    platform: str
    lowering: str
    kind: str
    bytes_per_second: float
    integer_per_second: float
    float_per_second: float
    source: str
    slices_narrow: bool = True

    def operations_per_byte(self, is_integer: bool) -> float:
        """Operations per byte above which arithmetic takes longer than memory."""
        rate = self.integer_per_second if is_integer else self.float_per_second
        return rate / self.bytes_per_second


# The first machine of a platform also represents machines that are not listed.
MACHINES = (
    # A sum over 256 MiB, and 2048 rows by 4096 x 4096 in W8A8 and float32: in `--suite cpu`.
    Machine(
        name="cpu",
        platform="cpu",
        lowering="cpu",
        kind="cpu",
        bytes_per_second=27e9,
        integer_per_second=0.69e12,
        float_per_second=0.19e12,
        source="measured on 2 cores with AVX512-VNNI",
        slices_narrow=False,
    ),
    Machine("v5e", "tpu", "tpu", "TPU v5 lite", 819e9, 394e12, 197e12, "Google's data sheet"),
    Machine("v6e", "tpu", "tpu", "TPU v6", 1640e9, 1836e12, 918e12, "Google's data sheet"),
    Machine("h200", "gpu", "cuda", "H200", 4800e9, 1979e12, 989e12, "NVIDIA's data sheet"),
)


def machine_for(platform: str | None) -> Machine:
    """The machine with this name, or the first of this platform; None for the default device.

    Raises:
        ValueError: no machine has that name or platform.
    """
    device = jax.devices()[0]
    wanted = device.platform if platform is None else platform
    found = [m for m in MACHINES if wanted in (m.name, m.platform)]
    if not found:
        names = dict.fromkeys(name for m in MACHINES for name in (m.platform, m.name))
        raise ValueError(
            f"platform must be one of {', '.join(names)}, or None for the default device's; got "
            f"{wanted!r}."
        )
    return next((m for m in found if m.kind in device.device_kind), found[0])
