"""PartitionSpecs of the arrays of a QTensor."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import (
    FP8_E4M3,
    INT4,
    NVFP4,
    ArrayConfig,
    Inputs,
    QTensor,
    quantize,
    refine_blocks,
    specs,
)

P = jax.P
X = np.random.default_rng(0).normal(size=(64, 24)).astype(np.float32)


def mesh(*lengths):
    names = ("a", "b")[: len(lengths)]
    kinds = (jax.sharding.AxisType.Auto,) * len(lengths)
    return jax.make_mesh(lengths, names, axis_types=kinds)


def test_codes_are_divided_in_the_order_in_which_they_are_stored():
    q = quantize(X, ArrayConfig(format=INT4, group_size=16), axis=0)
    found = specs(q, P("a", "b"))
    assert (found.codes, found.scale) == (P("a", "b"), P("a", "b"))
    swapped = specs(q.reorder((-1, -2)), P("a", "b"))
    assert (swapped.codes, swapped.scale) == (P("b", "a"), P("b", "a"))
    assert specs(q, P("a")).codes == P("a", None)


def test_block_scales_are_divided_along_axes_with_several_blocks():
    q = quantize(X, ArrayConfig(symmetric=False), axis=0)
    q = dataclasses.replace(q, offset=q.scale, inputs=Inputs(multiplier=jnp.ones(64)))
    found = specs(q, P("a", "b"))
    assert found.scale == found.zero_point == found.offset == P(None, "b")
    assert found.inputs.multiplier == P()


def test_nested_scales_are_divided_like_their_codes():
    found = specs(quantize(X, ArrayConfig(format=NVFP4), axis=0), P("a", "b"))
    assert found.scale.codes == P("a", "b")
    assert found.scale.scale == P(None, None)


def test_scales_that_the_devices_cannot_share_are_replicated():
    q = quantize(X, ArrayConfig(format=INT4, group_size=32), axis=0)
    found = specs(q, P("a", "b"), mesh(4, 2))
    assert (found.codes, found.scale) == (P("a", "b"), P(None, "b"))
    both = specs(q, P(("a", "b"), None), mesh(4, 2))
    assert (both.codes, both.scale) == (P(("a", "b"), None), P(None, None))


@pytest.mark.parametrize(
    ("spec", "on", "text"),
    [
        (P("a", None, "b"), None, r"spec must name at most 2 axes, .*; got P"),
        (P(None, "a"), mesh(7), r"7 devices along mesh axis 'a' cannot share 24 elements evenly"),
        (
            P("a"),
            mesh(6),
            r"6 devices along mesh axis 'a' cannot share 64 elements in 4 blocks evenly; got spec "
            r"P.*'a'.* for QTensor\(int4 64x24, scale \(4, 24\)",
        ),
        (P(("a", "c")), mesh(4, 2), r"must name axes of the mesh \('a', 'b'\); got 'c' in P"),
        (P(P.UNCONSTRAINED), mesh(4, 2), r"mesh \('a', 'b'\); got UNCONSTRAINED in P"),
        (P("a"), "a", r"mesh must be a Mesh, an AbstractMesh or None; got 'a'\."),
        ("ab", None, r"a QTensor and spec a jax\.P; got QTensor and 'ab'\."),
    ],
)
def test_specs_that_do_not_fit_are_errors(spec, on, text):
    q = quantize(X, ArrayConfig(format=INT4, group_size=16), axis=0)
    for function in (specs, refine_blocks):
        with pytest.raises(ValueError, match=text):
            function(q, spec, on)


@pytest.mark.parametrize(("size", "text"), [(32, " in 2 blocks"), (None, "")])
def test_the_error_counts_blocks_if_there_are_several(size, text):
    q = quantize(X, ArrayConfig(format=INT4, group_size=size), axis=0)
    with pytest.raises(
        ValueError, match=f"6 devices along mesh axis 'a' cannot share 64 elements{text} evenly"
    ):
        specs(q, P("a"), mesh(6))


def test_an_array_without_codes_is_an_error():
    with pytest.raises(ValueError, match=r"must be a QTensor and spec a jax\.P; got ndarray and"):
        specs(X, P("a"))  # pyright: ignore[reportArgumentType]


# Width and block of the contracted axis, and blocks after 8 devices share them.
WIDTHS = [
    (576, 32, 72),
    (896, 32, 56),
    (1536, 32, 48),
    (11008, 32, 344),
    (576, 192, 24),
    (896, 128, 56),
    (1536, 128, 24),
    (11008, 128, 344),
]


# Every other one is stored in another order.
REFINED = [(*row, (None, (-1, -2))[i % 2]) for i, row in enumerate(WIDTHS)]


@pytest.mark.some_rows(1)
@pytest.mark.parametrize(("width", "block", "count", "form"), REFINED, ids=str)
def test_blocks_that_devices_would_share_are_refined(width, block, count, form):
    config = ArrayConfig(format=INT4, group_size=block, symmetric=False)
    w = np.random.default_rng(0).normal(size=(width, 8)).astype(np.float32)
    q = quantize(w, config, axis=0)
    q = dataclasses.replace(q, offset=jnp.full(q.scale.shape, 0.5)).reorder(form)
    on, spec = mesh(8), P("a", None)

    finer = refine_blocks(q, spec, on)

    wanted = (count, 8) if form is None else (8, count)
    grids = finer.scale, finer.zero_point, finer.offset
    assert [x.shape for x in grids if x is not None] == [wanted] * 3
    assert finer.codes is q.codes
    # 344 groups of 32 are 43 on each device, and stay.
    assert (finer is q) == (width // block == count)
    # Compilers may fuse the product with the addition of the offset, and not round in between.
    assert_same = partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    assert_same(finer.dequantize(), q.dequantize())
    of_arrays = specs(finer, spec, on)
    assert of_arrays.scale == of_arrays.offset == of_arrays.codes
    placed = jax.device_put(finer, jax.tree.map(lambda s: jax.NamedSharding(on, s), of_arrays))
    # The part of each device is a QTensor by itself.
    part = jax.shard_map(lambda q: q.dequantize(), mesh=on, in_specs=(of_arrays,), out_specs=spec)
    assert_same(jax.jit(part)(placed), q.dequantize())


@pytest.mark.some_rows(1)
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((576, 1536), P("a", "b")),
        ((11008, 896), P("b", "a")),
        ((1536, 11008), P(None, ("a", "b"))),
    ],
    ids=str,
)
def test_two_dimensional_blocks_are_refined_along_both_axes(shape, spec):
    # 576 rows are not whole blocks of 128, so readers give them blocks of 64.
    blocks = tuple(math.gcd(n, 128) for n in shape)
    codes = np.random.default_rng(0).normal(size=shape).astype("float8_e4m3fn")
    scale = np.random.default_rng(1).uniform(
        1, 2, [n // b for n, b in zip(shape, blocks, strict=True)]
    )
    q = QTensor(
        jnp.asarray(codes), jnp.asarray(scale, jnp.float32), format=FP8_E4M3, dtype=jnp.float32
    )
    on = mesh(4, 2)
    finer = refine_blocks(q, spec, on)
    of_arrays = specs(finer, spec, on)
    assert of_arrays.scale == of_arrays.codes == P(*spec)
    np.testing.assert_array_equal(finer.dequantize(), q.dequantize())


def test_nested_scales_are_refined_at_each_level():
    # As in GGUF: 36 groups of 16 under 12 of 48.
    q = quantize(np.tile(X, (9, 1)), ArrayConfig(format=INT4, group_size=16), axis=0)
    assert isinstance(q.scale, jax.Array)
    q = dataclasses.replace(q, scale=quantize(q.scale, ArrayConfig(group_size=3), axis=0))
    finer = refine_blocks(q, P("a"), mesh(8))
    assert isinstance(finer.scale, QTensor)
    assert (finer.scale.shape, finer.scale.scale.shape) == ((72, 24), (24, 24))
    np.testing.assert_array_equal(finer.dequantize(), q.dequantize())


def test_shapes_are_refined_like_arrays():
    q = quantize(X, ArrayConfig(format=INT4, group_size=32), axis=0)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), q)
    found = refine_blocks(shapes, P("a"), mesh(8))
    assert (found.codes.shape, found.scale.shape) == ((64, 24), (8, 24))
    assert refine_blocks(q, P("a"), mesh(8)).scale.shape == (8, 24)


def test_a_scale_of_a_whole_axis_is_not_refined():
    q = quantize(X, ArrayConfig(format=INT4), axis=0)
    assert refine_blocks(q, P("a", "b"), mesh(4, 2)) is q


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("spec", [P("a", None), P(None, "a"), P("a", "b")], ids=str)
def test_divided_arrays_dequantize_to_the_same_values(spec):
    q = quantize(X, ArrayConfig(format=INT4, group_size=32, symmetric=False), axis=0)
    q = q.reorder((-1, -2))
    on = mesh(4, 2)
    shardings = jax.tree.map(lambda s: jax.NamedSharding(on, s), specs(q, spec, on))
    placed = jax.device_put(q, shardings)
    np.testing.assert_array_equal(placed.dequantize(), q.dequantize())
