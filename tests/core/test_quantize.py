import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import (
    FORMATS,
    INT2,
    INT4,
    INT8,
    MXFP4,
    NF4,
    NVFP4,
    W8A8,
    AbsMax,
    ArrayConfig,
    MinMSE,
    Percentile,
    abs_max_quantize,
    percentile_quantize,
    quantize,
    quantize_with_range,
    quantize_with_scale,
)

from .. import cases, checks, oracles

each_case = pytest.mark.parametrize("case", cases.CASES.values(), ids=cases.CASES)
few_cases = pytest.mark.parametrize("case", cases.FEW.values(), ids=cases.FEW)
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


@pytest.mark.some_rows(2)
@each_case
def test_codes_scales_and_zero_points_match_the_oracle(case):
    checks.check_matches_the_oracle(case, cases.gaussian())


@pytest.mark.some_rows(24)
@each_case
def test_each_code_is_the_nearest_one(case):
    checks.check_is_nearest(case, cases.gaussian())


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    "case",
    [c for c in cases.CASES.values() if c.config.format.rounds],
    ids=lambda c: str(c.config.format),
)
def test_error_is_at_most_half_a_step(case):
    checks.check_error_bound(case, cases.gaussian())


@pytest.mark.some_rows(11)
@each_case
def test_nan_and_infinity_make_only_their_own_group_nan(case):
    checks.check_non_finite_marks_its_group(case, cases.gaussian())


@each_case
def test_zeros_come_back_exactly_and_empty_groups_have_scale_1(case):
    checks.check_zeros_are_exact(case, cases.gaussian())


@few_cases
def test_inputs_are_unchanged(case):
    x = jnp.asarray(cases.gaussian())
    before = np.array(x)
    quantize(x, *case)
    np.testing.assert_array_equal(x, before)


EAGER = ["int2-asym_blocks", "nvfp4-row"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EAGER)
def test_jit_and_eager_agree_and_eval_shape_predicts_the_result(name):
    checks.check_jit_and_eager_agree(cases.FEW[name], cases.gaussian())


VMAPPED = ["int4-percentile", "int4-asym_nested_scales", "int2-asym_blocks", "nvfp4-row"]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", [*VMAPPED, "nf4-g32_nested_scales"])
def test_vmap_is_a_loop(name):
    checks.check_vmap_is_a_loop(cases.FEW[name], cases.gaussian((3, *cases.SHAPE)))


@pytest.mark.parametrize("name", cases.FLOORS)
def test_signal_to_noise_is_above_the_floor(name):
    x = np.random.default_rng(0).normal(size=cases.SHAPE).astype(np.float32)
    # Where noise is low, that of rounding to bfloat16 would show.
    for dtype in ["float32", "bfloat16"][: 1 + (name == "int8-row")]:
        q = quantize(x.astype(dtype), *cases.CASES[name])

        assert q.dequantize().dtype == dtype
        values = np.asarray(q.astype("float32").dequantize())
        assert oracles.sqnr(x.astype(dtype), values) > cases.FLOORS[name]


def test_min_mse_is_above_abs_max_in_signal_to_noise():
    x = np.random.default_rng(0).normal(size=cases.SHAPE).astype(np.float32)
    configs = ArrayConfig(format=INT4), ArrayConfig(format=INT4, range=MinMSE())
    plain, best = (oracles.sqnr(x, quantize(x, c, axis=1).dequantize()) for c in configs)
    assert best > plain + 0.5


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("magnitude", [1e-10, 1e-30, 1e30])
@each_format
def test_relative_precision_does_not_depend_on_the_magnitude(format, magnitude):
    config = ArrayConfig(format=format)
    x = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    expected = oracles.sqnr(x, quantize(x, config, axis=1).dequantize())
    small = (x * np.float32(magnitude)).astype(np.float32)
    got = oracles.sqnr(small / 1.0, np.asarray(quantize(small, config, axis=1).dequantize()))
    # A scale of exponents only moves within its octave.
    assert abs(got - expected) < (3 if config.stored_scale_dtype == "float8_e8m0fnu" else 0.3)


def test_an_empty_group_does_not_affect_small_groups_beside_it():
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32) * 1e-10
    config = ArrayConfig(format=NVFP4)
    expected = oracles.sqnr(x[1:], quantize(x[1:], config, axis=1).dequantize())
    x[0] = 0
    values = quantize(x, config, axis=1).dequantize()
    np.testing.assert_array_equal(values[0], 0)
    assert oracles.sqnr(x[1:], values[1:]) > expected - 0.1


@pytest.mark.parametrize("mean", [10, 30, 100, -10, -30, -100])
def test_groups_on_one_side_of_zero_keep_their_values(mean):
    x = (np.random.default_rng(0).normal(size=(8, 128)) + mean).astype(np.float32)
    config = ArrayConfig(format=INT4, symmetric=False)
    values = quantize(x, config, axis=1).dequantize()
    assert np.all(np.abs(values - x) < 0.06 * np.abs(x))


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("symmetric", [True, False])
@each_format
def test_values_near_the_largest_float_do_not_overflow(format, symmetric):
    if not (symmetric or format.rounds):
        with pytest.raises(ValueError, match="symmetric=False needs a format with integer codes"):
            ArrayConfig(format=format, symmetric=symmetric)
        return
    x = np.tile(np.linspace(-3e38, 3e38, 64, dtype=np.float32), (4, 1))
    for range in (ArrayConfig().range, Percentile(99)):
        if range == Percentile(99) and format not in (INT4, NF4, NVFP4):
            continue
        config = ArrayConfig(format=format, symmetric=symmetric, range=range)
        values = np.asarray(quantize(x, config, axis=1).dequantize())
        assert np.isfinite(values).all()
        if -format.qmin >= 6 and range == ArrayConfig().range:
            assert oracles.sqnr(x / 1e38, values / 1e38) > 15


NEAR_THE_LARGEST = ["int8-asym_row", "int4-min_mse", "int4-bfloat16_scales", "int4-asym_min_mse"]
NEAR_THE_LARGEST += ["int4-asym_bfloat16_scales", "int4-g32_e8m0_scales", "fp8_e4m3-row"]
NEAR_THE_LARGEST += ["mxfp8-row", "nf4-bfloat16_scales"]
NEAR_THE_LARGEST = [(name, "float32") for name in NEAR_THE_LARGEST] + [
    ("int8-row", "bfloat16"),
    ("int4-asym_nested_scales", "bfloat16"),
    ("fp8_e5m2-g64", "bfloat16"),
    ("mxfp4-row", "bfloat16"),
    ("int8-asym_tensor", "float16"),
    ("int4-asym_min_mse", "float16"),
    ("nf4-g32_nested_scales", "float16"),
    ("nvfp4-row", "float16"),
]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name, dtype", NEAR_THE_LARGEST)
def test_finite_values_near_the_largest_come_back_finite(name, dtype):
    largest = float(jnp.finfo(dtype).max)
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, cases.SHAPE)
    x[1::4], x[2::4] = np.abs(x[1::4]), -np.abs(x[2::4])
    x[:, ::16] = np.sign(x[:, ::16])
    x = jnp.asarray((x * largest).astype(np.float32).astype(dtype))
    assert np.isfinite(np.asarray(x)).all()
    values = quantize(x, *cases.CASES[name]).dequantize()
    assert values.dtype == dtype
    assert np.isfinite(np.asarray(values)).all()


def test_a_scale_whose_reciprocal_is_subnormal_is_not_divided_by():
    x = np.array([[2e38, -3e38, 1e38]], np.float32)
    values = quantize(x, ArrayConfig(format=INT2), axis=1).dequantize()
    np.testing.assert_allclose(values, np.array([[1, -2, 1]]) * 2.0**126)


def test_percentile_between_far_elements_does_not_overflow():
    x = np.array([[-3e38, 3e38]], np.float32)
    config = ArrayConfig(symmetric=False, range=Percentile(99))
    np.testing.assert_allclose(quantize(x, config, axis=1).dequantize(), x, rtol=0.03)


@pytest.mark.some_rows(2)
@each_format
def test_negative_zero_is_zero(format):
    x = np.array([[-0.0, 1, -0.0, -1] * 16, *[[-0.0] * 64] * 3], np.float32)
    values = np.asarray(quantize(x, ArrayConfig(format=format), axis=1).dequantize())
    np.testing.assert_array_equal(values[x == 0], 0)


@each_format
def test_subnormal_groups_come_back_as_zeros_and_subnormal_elements_as_zero(format):
    x = np.full((4, 64), 1e-41, np.float32)
    x[1, 0] = 1
    values = np.asarray(quantize(x, ArrayConfig(format=format), axis=1).dequantize())
    np.testing.assert_array_equal(values[[0, 2, 3]], 0)
    np.testing.assert_array_equal(values[1], np.eye(64)[0] * values[1, 0])
    np.testing.assert_allclose(values[1, 0], 1, rtol=0.34)


SHAPES = [
    ((7,), 0),
    ((5, 3), -1),
    ((3, 4, 5), (-1, -3)),
    ((2, 3, 5, 7), None),
    ((2, 1, 3, 2, 5), -2),
    ((2, 1, 3, 2, 5), (0, 2, 4)),
    ((1, 1), 0),
]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("shape, axis", SHAPES, ids=str)
def test_any_rank_any_odd_size_and_any_axis(shape, axis):
    x = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    config = ArrayConfig(format=INT4, range=Percentile(90), symmetric=False)
    checks.check_matches_the_oracle(cases.Case(config, axis), x)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("axis, group_size", [(1, 1), (-2, 3), ((1, 2), 2), ((-2, 0), 6)], ids=str)
def test_groups_along_inner_axes(axis, group_size):
    x = np.random.default_rng(4).normal(size=(6, 12, 6)).astype(np.float32)
    config = ArrayConfig(format=INT8, group_size=group_size, symmetric=False)
    checks.check_matches_the_oracle(cases.Case(config, axis), x)


def test_groups_of_one_size_per_axis_may_leave_an_axis_whole():
    x = np.random.default_rng(4).normal(size=(6, 12, 5)).astype(np.float32)
    case = cases.along((2, 1), group_size=(None, 4))
    assert quantize(x, *case).scale.shape == (6, 3, 1)
    checks.check_matches_the_oracle(case, x)


EMPTY = [((0, 8), 0), ((0, 8), 1), ((8, 0), 0), ((8, 0), 1), ((8, 0), (0, 1)), ((0,), 0)]
EMPTY = [(shape, axis, ArrayConfig(symmetric=False)) for shape, axis in EMPTY] + [
    (shape, 0, ArrayConfig(range=range, symmetric=symmetric))
    for shape in [(0, 8), (8, 0)]
    for range, symmetric in [(Percentile(99), False), (MinMSE(), True), (AbsMax(), True)]
]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("shape, axis, config", EMPTY, ids=str)
def test_arrays_without_elements(shape, axis, config):
    q = quantize(np.zeros(shape, np.float32), config, axis)
    assert q.shape == q.dequantize().shape == shape
    assert len(q.scale.shape) == len(shape)


@pytest.mark.parametrize("format", [MXFP4, NVFP4], ids=str)
def test_arrays_without_elements_in_formats_with_groups(format):
    for shape in [(0, 32), (32, 0)]:
        q = quantize(np.zeros(shape, np.float32), ArrayConfig(format=format), axis=1)
        assert q.dequantize().shape == shape


NARROW = [(name, dtype) for name, dtype in NEAR_THE_LARGEST if dtype != "float32"]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name, dtype", NARROW)
def test_narrow_floats_are_computed_in_float32(name, dtype):
    case, x = cases.CASES[name], cases.gaussian().astype(dtype)
    q = quantize(x, *case)
    wide = quantize(x.astype("float32"), *case)
    checks.assert_equal_quantized(q, wide.astype(dtype))
    assert q.dequantize().dtype == dtype


WIDE = ["int8-asym_tensor", "int4-percentile", "int4-min_mse", "nf4-g32_nested_scales"]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", [*WIDE, "fp8_e4m3-g32_float16_scales", "mxfp4-row"])
def test_float64_stays_float64(name):
    with jax.enable_x64(True):
        x = cases.gaussian().astype(np.float64)
        q = quantize(x, *cases.CASES[name])
        assert q.dequantize().dtype == np.float64
        checks.check_matches_the_oracle(cases.CASES[name], x)


def test_float64_scales_keep_precision_that_float32_would_lose():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(4, 64)) * 1e-200
        q = quantize(x, ArrayConfig(scale_dtype="float64"), axis=1)
        assert q.scale.dtype == np.float64
        np.testing.assert_allclose(q.scale, np.abs(x).max(1, keepdims=True) / 127, rtol=1e-14)
        assert np.all(np.abs(q.dequantize() - x) <= 0.5000001 * checks.scale_of(q))


def test_codes_are_rounded_with_the_scale_that_is_stored():
    x = np.random.default_rng(0).normal(size=cases.SHAPE).astype(np.float32)
    q = quantize(x, ArrayConfig(scale_dtype="bfloat16"), axis=1)
    scale = np.asarray(q.scale).astype(np.float32)
    assert q.scale.dtype == "bfloat16"
    inside = np.abs(x) <= 127.5 * scale
    assert np.all((np.abs(q.dequantize() - x) <= 0.50002 * scale)[inside])


@pytest.mark.parametrize("value", [1e-20, 1e20])
def test_scales_below_a_narrow_dtype_are_its_smallest_and_those_above_are_nan(value):
    config = ArrayConfig(scale_dtype="float16")
    q = quantize(np.full((1, 4), value, np.float32), config, axis=1)
    smallest = np.finfo(np.float16).smallest_subnormal
    np.testing.assert_array_equal(checks.scale_of(q)[0, 0], smallest if value < 1 else np.nan)
    assert np.isfinite(q.dequantize()).all() == (value < 1)


@pytest.mark.parametrize("deviation", [1e-2, 1e-3, 1e-4])
def test_float16_scales_suffice_for_ordinary_weights(deviation):
    x = deviation * cases.gaussian((64, 4096))
    q = quantize(x, ArrayConfig(group_size=128, scale_dtype="float16"), axis=1)
    assert oracles.sqnr(x, q.dequantize()) > 40 - 6 * (deviation < 1e-3)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-19, 1e20, 1e30])
def test_min_mse_gains_as_much_at_any_magnitude(magnitude):
    x = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    config = ArrayConfig(format=INT4, range=MinMSE())
    expected = quantize(x, config, axis=1).codes
    scaled = quantize(x * np.float32(magnitude), config, axis=1).codes
    assert np.mean(np.asarray(scaled != expected)) < 0.01


def test_power_of_two_scales_do_not_clip_integer_codes():
    x = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    for format in (INT4, NF4):
        config = ArrayConfig(format=format, scale_dtype="float8_e8m0fnu")
        q = quantize(x, config, axis=1)
        largest = np.asarray(q.scale, np.float32) * min(-format.qmin, format.qmax)
        assert (np.abs(x) <= largest).all()
        assert (np.abs(x).max(1, keepdims=True) > largest / 2).all()


@pytest.mark.parametrize(
    "x, config, text",
    [
        (jnp.ones(4), W8A8, "config must be an ArrayConfig; got Scheme.*pass s.weights"),
        (jnp.ones(4), INT8, r"got int8\. For a Scheme.*ArrayConfig\(format=f\)"),
        (jnp.ones(4), "int4", "config must be an ArrayConfig; got 'int4'"),
        (
            jnp.ones(20),
            ArrayConfig(format=MXFP4),
            "got group_size=32 for .*Pad the axis, or choose another format",
        ),
        ([1.0, 2.0], ArrayConfig(), "x must be a floating-point array; got list"),
        (
            quantize(jnp.ones(4), ArrayConfig()),
            ArrayConfig(),
            "is already quantized; got QTensor",
        ),
    ],
)
@pytest.mark.parametrize("function", [quantize, abs_max_quantize])
def test_mistaken_arguments_are_named(function, x, config, text):
    with pytest.raises(ValueError, match=text):
        function(x, config)


def test_a_given_scale_that_is_not_positive_makes_its_block_nan():
    x = jnp.ones((2, 4))
    q = quantize_with_scale(x, jnp.array([[0.0], [1.0]]), None, ArrayConfig())
    assert np.isnan(q.dequantize()[0]).all()
    np.testing.assert_array_equal(q.dequantize()[1], 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_given_zero_point_that_is_not_finite_makes_its_block_nan(bad):
    x, config = jnp.ones((2, 4)), ArrayConfig(symmetric=False)
    zero_point = jnp.array([[bad], [3.0]])
    q = quantize_with_scale(x, jnp.full((2, 1), 0.5), zero_point, config)
    assert np.isnan(q.dequantize()[0]).all()
    np.testing.assert_array_equal(q.dequantize()[1], 1)


@pytest.mark.parametrize(
    "config, zero_point",
    [
        (ArrayConfig(), jnp.zeros((1, 4), jnp.int8)),
        (ArrayConfig(symmetric=False), jnp.zeros((), jnp.int8)),
    ],
)
def test_a_zero_point_must_fit_config_and_scale(config, zero_point):
    with pytest.raises(ValueError, match=r"have the shape of scale, \(1, 4\); got shape"):
        quantize_with_scale(jnp.ones((3, 4)), jnp.ones((1, 4)), zero_point, config)


def _quantize_with_unit_range(x, config, axis):
    return quantize_with_range(x, jnp.float32(-1), jnp.float32(1), config, axis)


WITH_AXIS = [
    (quantize, ArrayConfig()),
    (abs_max_quantize, ArrayConfig()),
    (percentile_quantize, ArrayConfig(range=Percentile(97))),
    (_quantize_with_unit_range, ArrayConfig()),
]


@pytest.mark.parametrize("function, config", WITH_AXIS, ids=lambda f: getattr(f, "__name__", ""))
@pytest.mark.parametrize("seed", [jax.random.key, jax.random.PRNGKey], ids=["key", "raw key"])
def test_a_key_in_place_of_the_axis_is_named(function, config, seed):
    message = r"axis must be an int.*got an array, (key<fry>|uint32) of shape .*by name: key=key"
    with pytest.raises(ValueError, match=message):
        function(jnp.ones((4, 2)), config, seed(0))


def test_equal_configs_share_one_compilation():
    traces = []

    @jax.jit
    def f(x, config):
        traces.append(config)
        return quantize(x, config)

    for _ in range(3):
        f(jnp.ones((8, 3)), ArrayConfig(group_size=4, range=Percentile(99), value_range=(-100, 9)))
    assert len(traces) == 1
    f(jnp.ones((8, 3)), ArrayConfig(group_size=4, range=Percentile(98), value_range=(-100, 9)))
    assert len(traces) == 2


@pytest.mark.parametrize("function", [quantize, abs_max_quantize])
def test_integer_input_raises(function):
    message = r"x must be a floating-point array; got int32 of shape \(4, 2\)\. Use jnp\.asarray"
    with pytest.raises(ValueError, match=message):
        function(jnp.ones((4, 2), jnp.int32), ArrayConfig())


NAMED = [
    (abs_max_quantize, ArrayConfig(), Percentile(99)),
    (percentile_quantize, ArrayConfig(range=Percentile(97)), ArrayConfig().range),
]


@pytest.mark.parametrize("function, config, other", NAMED, ids=["abs_max", "percentile"])
def test_named_quantizers_are_quantize_for_their_range(function, config, other):
    x = cases.gaussian()
    checks.assert_equal_quantized(function(x, config, 1), quantize(x, config, 1))
    message = r"config\.range must be \w+\(\.\.\.\) here; got .*quantize\(x, config\) supports any"
    with pytest.raises(ValueError, match=message):
        function(x, ArrayConfig(range=other), axis=1)


GIVEN = [((), True), ((1, 1), False), ((64, 1), True), ((64, 8), False), ((4, 8), True)]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("shape, has_zero_point", [*GIVEN, ((1, 256), True)], ids=str)
def test_a_given_scale_is_used_as_it_is(shape, has_zero_point):
    x, random = cases.gaussian(), np.random.default_rng(5)
    scale = (random.random(shape) + 0.1).astype(np.float32)
    zero_point = random.integers(1, 9, shape) if has_zero_point else None

    q = quantize_with_scale(x, scale, zero_point, ArrayConfig(symmetric=not has_zero_point))

    whole = oracles.repeat_groups(scale.reshape(shape or (1, 1)), x.shape)
    zero = oracles.repeat_groups(checks.zero_point_of(q), x.shape)
    assert (zero == 0).all() != has_zero_point
    if zero_point is not None:
        np.testing.assert_array_equal(checks.zero_point_of(q), zero_point.reshape(q.scale.shape))
    codes = np.clip(np.round(x / whole) + zero, -127, 127)
    is_clear = np.abs(np.abs(x / whole) % 1 - 0.5) > 1e-4
    np.testing.assert_array_equal(checks.codes_of(q)[is_clear], codes[is_clear])
    np.testing.assert_array_equal(q.scale, scale.reshape(shape or (1, 1)))
    np.testing.assert_allclose(q.dequantize(), (checks.codes_of(q) - zero) * whole, rtol=1e-6)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", ["int4-asym_min_mse", "int2-asym_blocks", "nf4-g64", "nvfp4-row"])
def test_quantizing_with_its_own_scale_changes_nothing(name):
    case, x = cases.CASES[name], cases.gaussian()
    q = quantize(x, *case)
    scale = checks.scale_of(q).astype(np.float32)
    again = quantize_with_scale(x, scale, q.zero_point, case.config)
    np.testing.assert_array_equal(checks.codes_of(again), checks.codes_of(q))


def test_a_given_scale_does_not_hide_nan():
    x = np.ones((4, 6), np.float32)
    x[2, 5] = np.inf
    values = quantize_with_scale(x, np.ones((4, 2), np.float32), None, ArrayConfig()).dequantize()
    expected = np.zeros((4, 6), bool)
    expected[2, 3:] = True
    np.testing.assert_array_equal(np.isnan(values), expected)


def test_a_given_scale_must_divide_the_shape():
    message = (
        r"scale must be a scalar, or have the rank of x and lengths that divide those of x; got "
        r"scale \(3, 1\) for x \(4, 6\)"
    )
    with pytest.raises(ValueError, match=message):
        quantize_with_scale(jnp.ones((4, 6)), jnp.ones((3, 1)), None, ArrayConfig())
    with pytest.raises(ValueError, match=r"got scale \(6,\) for x \(4, 6\)"):
        quantize_with_scale(jnp.ones((4, 6)), jnp.ones((6,)), None, ArrayConfig())
    with pytest.raises(ValueError, match="x must be a floating-point array; got int32"):
        quantize_with_scale(jnp.ones((4, 6), jnp.int32), jnp.ones(()), None, ArrayConfig())


SPANS = {
    "int4-asym_g32": (64, 8),
    "int2-asym_blocks": (4, 4),
    "fp8_e4m3-g32_e8m0_scales": (64, 8),
    "nf4-g32_nested_scales": (64, 8),
    "mxfp4-row": (64, 8),
    "int8-asym_value_range": (64, 1),
}


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", SPANS)
def test_the_range_that_is_found_and_the_same_that_is_given_are_alike(name):
    case, x = cases.CASES[name], cases.gaussian()
    low, high = ends = np.zeros((2, *SPANS[name]), np.float32)
    for index, where in oracles.blocks(x.shape, *case)[1]:
        ends[(slice(None), *index)] = oracles.abs_max_range(x[where], case.config.symmetric)

    given = quantize_with_range(x, low, high, *case)

    checks.assert_equal_quantized(given, quantize(x, *case))


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    "low, high, config, scale, zero_point",
    [
        (-9.0, 7.0, ArrayConfig(format=INT4), 1, None),
        (jnp.nan, 14.0, ArrayConfig(format=INT4), 2, None),
        (-1.0, 0.0, ArrayConfig(format=INT4), 1, None),
        (0.0, -7.0, ArrayConfig(format=INT4), np.nan, None),
        (0.0, jnp.inf, ArrayConfig(format=INT4), np.nan, None),
        (0.0, jnp.nan, ArrayConfig(format=INT4), np.nan, None),
        (-8.0, 7.0, ArrayConfig(format=INT4, symmetric=False), 1, 0),
        (3.0, 7.5, ArrayConfig(format=INT4, symmetric=False), 0.5, -8),
        (-15.0, -1.0, ArrayConfig(format=INT4, symmetric=False), 1, 7),
        (0.0, 0.0, ArrayConfig(format=INT4, symmetric=False), 1, -8),
        (2.0, 1.0, ArrayConfig(format=INT4, symmetric=False), np.nan, 0),
        (-jnp.inf, 1.0, ArrayConfig(format=INT4, symmetric=False), np.nan, 0),
        (jnp.nan, 1.0, ArrayConfig(format=INT4, symmetric=False), np.nan, 0),
        (0.0, 3.0, ArrayConfig(format=INT4, scale_dtype="float8_e8m0fnu"), 0.5, None),
    ],
)
def test_a_given_range_is_widened_to_include_zero_and_an_invalid_one_gives_nan(
    low, high, config, scale, zero_point
):
    x = np.array([[1.0, -2.0, 0.0], [30.0, 4.0, -20.0]], np.float32)

    q = quantize_with_range(x, jnp.float32(low), jnp.float32(high), config)

    np.testing.assert_allclose(checks.scale_of(q), np.full((1, 3), scale), rtol=1e-6)
    if zero_point is not None:
        np.testing.assert_array_equal(checks.zero_point_of(q), np.full((1, 3), zero_point))
    bare, zero = np.full(x.shape, scale), np.full(x.shape, zero_point or 0)
    values = np.asarray(q.dequantize())
    want = (np.clip(np.round(x / bare) + zero, -8, 7) - zero) * bare
    np.testing.assert_allclose(values, want, rtol=1e-6)


def test_a_given_range_propagates_nan_and_supports_narrow_floats():
    x = np.ones((2, 4), np.float32)
    x[1, 2] = np.nan
    ends = np.array([[-2.0], [-2.0]], np.float32), np.array([[2.0], [2.0]], np.float32)
    values = quantize_with_range(x, *ends, ArrayConfig(), axis=1).dequantize()
    np.testing.assert_array_equal(np.isnan(values).all(1), [False, True])
    narrow = quantize_with_range(jnp.asarray(x, jnp.bfloat16), *ends, ArrayConfig(), axis=1)
    assert narrow.dequantize().dtype == jnp.bfloat16


def test_a_given_range_must_have_the_shape_of_the_scales():
    text = r"must be scalars or have the shape of the scales, \(1, 4\); got \(4,\) for x \(3, 4\)"
    with pytest.raises(ValueError, match=text):
        quantize_with_range(jnp.ones((3, 4)), jnp.zeros(()), jnp.ones(4), ArrayConfig())
    with pytest.raises(ValueError, match="x must be a floating-point array; got int32"):
        quantize_with_range(jnp.ones(4, jnp.int32), jnp.zeros(()), jnp.ones(()), ArrayConfig())
