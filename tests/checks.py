"""What every number format must do, as functions of a case. Each asserts."""

import jax
import ml_dtypes
import numpy as np

from jaxquant import AbsMax, Percentile, quantize

from . import cases, oracles

NOT_A_NUMBER = (np.nan, np.inf, -np.inf)


def scale_of(q):
    """The scales in float64, nested or not."""
    if hasattr(q.scale, "codes"):
        return oracles.dequantize(q.scale)
    return np.asarray(q.scale).astype(np.float64)


def zero_point_of(q):
    scale = scale_of(q)
    return np.zeros(scale.shape) if q.zero_point is None else np.asarray(q.zero_point, np.float64)


def codes_of(q):
    """The codes in float64; those of codebooks as indices."""
    codes = np.asarray(q.codes).astype(np.float64)
    return codes % 2**q.format.bits if q.format.codebook else codes


def assert_equal_quantized(q, other):
    """Bit for bit, in every leaf and every static field."""
    assert jax.tree.structure(q) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_same_quantized(q, codes, scale, zero_point, x, config):
    """Scales to float32 rounding, zero points, and codes wherever x is not next to a tie."""
    np.testing.assert_allclose(scale_of(q), scale, rtol=1e-6)
    np.testing.assert_array_equal(zero_point_of(q), zero_point)
    down, up = (oracles.encode_all(x, scale * f, zero_point, config) for f in (0.99999, 1.00001))
    is_clear = down == up
    assert is_clear.mean() > 0.99
    np.testing.assert_array_equal(codes_of(q)[is_clear], codes[is_clear])


def check_matches_the_oracle(case, x):
    config = case.config
    q = quantize(x, *case)
    range_of = {
        AbsMax: oracles.abs_max_range,
        Percentile: lambda g, symmetric: oracles.percentile_range(g, symmetric, config.range.p),
    }.get(type(config.range))
    if range_of is None:  # The range has tests of its own; the codes follow from the scale.
        scale, zero_point = scale_of(q), zero_point_of(q)
        codes = oracles.encode_all(x, scale, zero_point, config)
    else:
        codes, scale, zero_point = oracles.quantize(x, config, case.axis, range_of)
    assert q.codes.dtype.name == config.format.dtype
    assert q.shape == x.shape
    assert (q.zero_point is None) == config.symmetric
    assert_same_quantized(q, codes, scale, zero_point, x, config)
    values = np.asarray(q.dequantize(), np.float64)
    np.testing.assert_allclose(values, oracles.dequantize(q), rtol=1e-6)


def points_of(config):
    """The values that codes stand for, ascending."""
    format, (low, high) = config.format, oracles.bounds(config)
    if format.codebook is not None:
        return np.asarray(format.codebook)
    if format.rounds:
        return np.arange(low, high + 1.0)
    dtype = np.dtype(getattr(ml_dtypes, format.dtype))
    every = np.arange(2 ** ml_dtypes.finfo(dtype).bits, dtype=np.uint8).view(dtype)
    every = every.astype(np.float64)
    return np.unique(every[(every >= low) & (every <= high)])


def check_is_nearest(case, x):
    """No other code of the group's scale would be nearer, clipped elements included."""
    config = case.config
    q = quantize(x, *case)
    step, zero = (
        oracles.repeat_groups(scale_of(q), x.shape),
        oracles.repeat_groups(zero_point_of(q), x.shape),
    )
    points = points_of(config)
    wanted = x.astype(np.float64) / step + zero
    above = np.clip(np.searchsorted(points, wanted), 1, len(points) - 1)
    best = np.minimum(np.abs(points[above] - wanted), np.abs(points[above - 1] - wanted))
    got = np.abs(np.asarray(q.dequantize(), np.float64) - x) / step
    assert np.all(got <= best + 1e-5 * (1 + np.abs(wanted)))


def check_error_bound(case, x):
    """Integer formats: half a step wherever nothing is clipped, which abs-max never does."""
    config = case.config
    q = quantize(x, *case)
    step, zero = (
        oracles.repeat_groups(scale_of(q), x.shape),
        oracles.repeat_groups(zero_point_of(q), x.shape),
    )
    qmin, qmax = oracles.bounds(config)
    values = x.astype(np.float64) / step + zero
    is_inside = (values >= qmin - 0.5) & (values <= qmax + 0.5)
    has_float_scales = (config.scale_dtype or config.format.scale_dtype) == "float32"
    if isinstance(config.range, AbsMax) and has_float_scales and not config.value_range:
        assert np.all((values > qmin - 0.501) & (values < qmax + 0.501 + (not config.symmetric)))
    # A tie counts as inside; an asymmetric zero point is rounded, and may move one up to it.
    error = np.abs(np.asarray(q.dequantize(), np.float64) - x)[is_inside]
    assert np.all(error <= 0.50002 * step[is_inside])


def check_grid_round_trip(case, seed):
    """Values on the grid of a group come back exactly."""
    config = case.config
    random = np.random.default_rng(seed)
    points, shape = points_of(config), cases.SHAPE
    counts, blocks = oracles.blocks(shape, *case)
    scale = np.exp2(random.integers(-3, 4, counts))
    zero_point = np.zeros(counts)
    if config.symmetric:
        points = points[np.abs(points) <= min(-points[0], points[-1])]
    else:
        zero_point = random.integers(points[0], points[-1] + 1, counts).astype(np.float64)
    wanted = random.choice(points, shape)
    x = np.zeros(shape, np.float32)
    for index, where in blocks:
        corner = tuple(s.start for s in where)
        wanted[corner] = points[-1]
        wanted[(*corner[:-1], corner[-1] + 1)] = points[0]
        x[where] = (wanted[where] - zero_point[index]) * scale[index]

    q = quantize(x, *case)

    np.testing.assert_array_equal(oracles.code_values(q.codes, config.format), wanted)
    np.testing.assert_array_equal(zero_point_of(q), zero_point)
    # Steps that are quotients, of two levels or of an odd number of codes, are rounded.
    is_quotient = hasattr(q.scale, "codes") or config.value_range
    np.testing.assert_allclose(q.dequantize(), x, rtol=1e-6 if is_quotient else 0)


def check_non_finite_marks_its_group(case, x):
    """NaN or Inf makes exactly the group that holds it NaN."""
    q = quantize(x, *case)
    kept = None if hasattr(q.scale, "codes") else np.asarray(q.dequantize())
    for bad, where in zip(NOT_A_NUMBER, [(7, 100), (0, 0), (63, 255)], strict=True):
        broken = x.copy()
        broken[where] = bad
        expected = np.zeros(x.shape, bool)
        for _, block in oracles.blocks(x.shape, *case)[1]:
            if all(s.start <= i < s.stop for s, i in zip(block, where, strict=True)):
                expected[block] = True
        assert expected[where]

        values = np.asarray(quantize(broken, *case).dequantize())

        np.testing.assert_array_equal(np.isnan(values), expected)
        assert np.isfinite(values[~expected]).all()
        if kept is not None:
            np.testing.assert_array_equal(values[~expected], kept[~expected])


def check_zeros_are_exact(case, x):
    values = np.asarray(quantize(x, *case).dequantize())
    assert (x == 0).any()
    np.testing.assert_array_equal(values[x == 0], 0)
    q = quantize(np.zeros_like(x), *case)
    np.testing.assert_array_equal(q.dequantize(), 0)
    if not hasattr(q.scale, "codes"):
        np.testing.assert_array_equal(scale_of(q), 1)


def check_jit_and_eager_agree(case, x):
    config = case.config
    q = quantize(x, *case)
    with jax.disable_jit():
        eager = quantize(jax.numpy.asarray(x), *case)
    assert jax.tree.structure(q) == jax.tree.structure(eager)
    assert_same_quantized(q, codes_of(eager), scale_of(eager), zero_point_of(eager), x, config)
    jitted = jax.jit(lambda x: quantize(x, *case))(x)
    assert_same_quantized(q, codes_of(jitted), scale_of(jitted), zero_point_of(jitted), x, config)
    shapes = jax.eval_shape(lambda x: quantize(x, *case), jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert jax.tree.structure(q) == jax.tree.structure(shapes)
    for leaf, shape in zip(jax.tree.leaves(q), jax.tree.leaves(shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)


def check_vmap_is_a_loop(case, stack):
    config = case.config
    q = jax.vmap(lambda x: quantize(x, *case))(stack)
    values = jax.vmap(lambda q: q.dequantize())(q)
    for i, x in enumerate(stack):
        one = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], q)
        alone = quantize(x, *case)
        assert jax.tree.structure(one) == jax.tree.structure(alone)
        assert_same_quantized(
            one, codes_of(alone), scale_of(alone), zero_point_of(alone), x, config
        )
        np.testing.assert_allclose(values[i], oracles.dequantize(one), rtol=1e-6)


def check_true_bytes(case, x):
    """Codes at the bits of their dtype; scales and zero points at theirs."""
    config = case.config
    q = jax.eval_shape(lambda: quantize(x, *case))
    count = len(oracles.blocks(x.shape, *case)[1])
    scale_dtype = config.scale_dtype or config.format.scale_dtype
    bits = x.size * ml_dtypes_bits(config.format.dtype) + count * ml_dtypes_bits(scale_dtype)
    bits += 0 if config.symmetric else count * ml_dtypes_bits(config.format.dtype)
    pieces = 32 if hasattr(q.scale, "codes") else 0
    spare = 2 if count * 2 % 8 else 0  # Each leaf takes whole bytes.
    assert 0 <= q.nbytes - (bits + pieces) / 8 < 1 + spare


def ml_dtypes_bits(dtype):
    """Bits of a dtype by the number in its name: float4_e2m1fn has 4."""
    digits = dtype.replace("bfloat", "float").lstrip("uintfloa").split("_")[0]
    return int(digits)
