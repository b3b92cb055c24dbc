"""Lowering Triton's kernels without a GPU, for tests."""

import warnings

import jax


def lowered_for_gpu(function, *args, platforms: tuple[str, ...] = ("cuda",)) -> str:
    """The program as text.

    From 0.11 on, JAX warns that it will drop Triton: exactly when the program has such a kernel.
    """
    context = jax.sharding.use_abstract_mesh(mesh_of_gpus())
    with warnings.catch_warnings(record=True) as caught, context:
        warnings.simplefilter("always")
        text = jax.jit(function).trace(*args).lower(lowering_platforms=platforms).as_text()
    warns = jax.__version_info__ >= (0, 11) and "gpu.triton" in text
    assert all("Triton backend is deprecated" in str(warning.message) for warning in caught)
    assert bool(caught) == warns
    return text


def mesh_of_gpus(**axes: int) -> jax.sharding.AbstractMesh:
    """A mesh with these axes, of GPUs that are not there."""
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    gpu = jax.sharding.AbstractDevice("NVIDIA H200", num_cores=132, platform="gpu")
    return jax.sharding.AbstractMesh(
        tuple(axes.values()), tuple(axes), axis_types=kinds, abstract_device=gpu
    )
