"""Which branch a lowered program holds, by where it will run."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxquant.jaxprs import (
    chips,
    lowering,
    on_one_cpu,
    on_one_gpu,
    on_one_tpu,
    unless_exported,
    unless_partitioned,
)

X = jnp.arange(8.0)
SWITCHES = {"cpu": on_one_cpu, "tpu": on_one_tpu, "cuda": on_one_gpu}


def switched(where, x):
    """sin(x) here, and cos(x) elsewhere."""
    return where(jnp.sin, jnp.cos, x)


def is_here(lowered):
    found = {name: f"stablehlo.{name}ine" in lowered.as_text() for name in ("s", "cos")}
    assert sorted(found.values()) == [False, True], lowered.as_text()
    return found["s"]


def lowered_for(platforms, function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=platforms)


def exported(function, platforms):
    return jax.export.export(jax.jit(function), platforms=platforms)(X)


def is_exported_here(program):
    text = program.mlir_module()
    return "stablehlo.sine" in text


def mesh(kind=AxisType.Auto, shape=(2,), names=("a",)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


@pytest.mark.parametrize("platform", SWITCHES)
def test_a_program_for_one_device_has_the_kernel(platform):
    run = partial(switched, SWITCHES[platform])
    assert is_here(lowered_for((platform,), run, X))
    assert is_here(lowered_for((platform,), partial(switched, unless_exported), X))


@pytest.mark.parametrize("platform", SWITCHES)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_program_that_xla_partitions_has_not(platform, kind):
    x = jax.device_put(X, jax.NamedSharding(mesh(kind), jax.P("a")))
    assert not is_here(lowered_for((platform,), partial(switched, SWITCHES[platform]), x))
    assert not is_here(lowered_for((platform,), partial(switched, unless_partitioned), x))
    assert is_here(lowered_for((platform,), partial(switched, unless_exported), x))


@pytest.mark.parametrize("platform", SWITCHES)
def test_each_device_has_the_kernel_inside_shard_map(platform):
    run = partial(switched, SWITCHES[platform])

    def mapped(on, names):
        spec = jax.P("a")
        return jax.shard_map(run, mesh=on, axis_names=names, in_specs=spec, out_specs=spec)

    assert is_here(lowered_for((platform,), mapped(mesh(), {"a"}), X))
    two = mesh(shape=(2, 1), names=("a", "b"))
    assert is_here(lowered_for((platform,), mapped(two, {"a", "b"}), X))
    # XLA partitions along the other axis.
    assert not is_here(lowered_for((platform,), mapped(two, {"a"}), X))


def test_exported_programs_have_no_native_code_and_no_triton_kernel():
    found = {
        platform: is_exported_here(exported(partial(switched, where), (platform,)))
        for platform, where in SWITCHES.items()
    }
    assert found == {"cpu": False, "tpu": True, "cuda": False}
    assert not is_exported_here(exported(partial(switched, unless_exported), ("cpu",)))
    assert is_exported_here(exported(partial(switched, unless_partitioned), ("cpu",)))
    assert not is_exported_here(exported(partial(switched, on_one_tpu), ("tpu", "cpu")))


def test_kernels_for_another_platform_are_an_error():
    for where, words in (
        (on_one_tpu, "'pallas' needs a TPU"),
        (on_one_gpu, "'triton' needs a GPU"),
    ):
        with pytest.raises(ValueError, match=f"implementation={words}.*; got a program for cpu"):
            jax.jit(partial(switched, where)).lower(X)


def test_a_program_for_one_cpu_is_recognized():
    seen = []

    def select(context):
        seen.append(context is not None and lowering.is_for_one_cpu(context))
        return 0

    def run(x):
        return lowering.lowering_switch((jnp.sin, jnp.cos), select, x)

    lowered_for(("cpu",), run, X)
    lowered_for(("tpu",), run, X)
    exported(run, ("cpu",))
    lowered_for(("cpu",), run, jax.device_put(X, jax.NamedSharding(mesh(), jax.P("a"))))
    assert seen == [True, False, False, False]


def test_outside_of_jit_and_under_transformations_it_is_a_function():
    def run(x, y):
        both = on_one_cpu(
            lambda x, y: {"sum": x + y, "product": x * 2.0},
            lambda x, y: {"sum": x + y, "product": x * 3.0},
            x,
            y,
        )
        return both["sum"] + both["product"]

    y = jnp.ones(8)
    np.testing.assert_allclose(run(X, y), 3 * X + 1)
    with jax.disable_jit():
        np.testing.assert_allclose(run(X, y), 3 * X + 1)
    for axes in ((0, None), (0, 0)):
        args = jnp.stack([X, 2 * X]), y if axes[1] is None else jnp.stack([y, y])
        got = jax.jit(jax.vmap(run, axes))(*args)
        np.testing.assert_allclose(got, np.stack([3 * X + 1, 6 * X + 1]))
    # Kernels have no transpose: it is that of the other function.
    (got,) = jax.linear_transpose(lambda x: run(x, jnp.zeros(8)), X)(y)
    np.testing.assert_allclose(got, 4 * np.ones(8))


def test_generations_are_known_by_the_kind_of_a_device():
    kinds = {"TPU v5 lite": "v5e", "TPU v6 lite": "v6e", "TPU v5p": "v5p", "H200": None, None: None}
    for kind, generation in kinds.items():
        device = type("Device", (), {"device_kind": kind})
        assert chips.tpu_generation(device) == generation
    assert chips.generation() is None


def test_the_generation_is_that_of_the_described_devices(libtpu):
    from benchmarks import tpu_compiler

    for chip, wanted in (("v5e", True), ("v6e", False)):
        sharding = jax.sharding.SingleDeviceSharding(tpu_compiler.device(chip))
        x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)

        def run(x):
            return chips.by_generation({"v5e": jnp.sin}, jnp.cos, x)

        assert is_here(jax.jit(run).lower(x)) == wanted
    assert not is_here(jax.jit(run).lower(X))
    assert not is_exported_here(exported(run, ("tpu",)))
