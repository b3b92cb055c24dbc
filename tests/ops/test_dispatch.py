from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import FP8_E4M3, INT2, ArrayConfig, matmul, quantize
from jaxquant.jaxprs import chips, marking, walk
from jaxquant.ops import dispatch
from jaxquant.ops.dispatch import Implementation

from ..cases import Case
from .products import K, M, assert_product, normal, weight

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Spec(int):
    """The arguments of an operation: a number; the row "small" supports up to 3."""

    operation: ClassVar[str] = "dot_general"
    contract = channels = ((1,), (1,))
    batch = ((), ())
    group_sizes = None
    arrays = ()

    def unfold(self, x, weights):
        return x

    def with_arrays(self):
        return self

    def with_unquantized(self, rows):
        return self

    def length(self, lhs, rhs):
        return lhs.shape[1]

    def rows(self, lhs, rhs):
        return None

    def convolution(self, lhs, rhs):
        return None

    def shares(self, lhs, rhs):
        return None


def constant(value):
    return lambda lhs, rhs, spec: jnp.full(lhs.shape, value)


def never(lhs, rhs, spec):
    return "it never can"


def always(lhs, rhs, spec):
    return None


TABLE = (
    Implementation("impossible", constant(0.0), never),
    Implementation("for cpu", constant(1.0), always, platforms=("cpu",)),
    Implementation("small", constant(2.0), lambda a, b, spec: "too long" if spec > 3 else None),
    Implementation("last", constant(3.0), always),
)
X = jnp.zeros((2, 3))


@pytest.mark.parametrize(
    "platform, spec, name",
    [
        ("cpu", 3, "for cpu"),
        ("cpu", 4, "for cpu"),
        ("tpu", 3, "small"),
        ("tpu", 4, "last"),
        ("default", 3, "small"),
        ("default", 4, "last"),
    ],
)
def test_the_first_able_row_for_the_platform_is_chosen(platform, spec, name):
    assert dispatch.select_row(TABLE, X, X, spec, platform)[0].name == name


BY_CHIP = (
    Implementation(
        "quick",
        constant(1.0),
        always,
        ("tpu",),
        lambda lhs, rhs, spec, chip: None if chip == "v6e" else f"slow on {chip}",
    ),
    TABLE[-1],
)


def test_the_chip_selects_its_row_when_the_program_is_lowered(monkeypatch):
    passed_over = (("quick", "slow on v5e"),)
    assert dispatch.select_row(BY_CHIP, X, X, 1, "tpu", "v6e") == (BY_CHIP[0], ())
    assert dispatch.select_row(BY_CHIP, X, X, 1, "tpu", "v5e") == (BY_CHIP[1], passed_over)
    for chip, wanted in {"v6e": "1.0", "v5e": "3.0", "7x": "3.0", None: "3.0"}.items():
        monkeypatch.setattr(chips, "target", lambda module, chip=chip: chip)
        for run in (partial(dispatch.run, implementation=None), dispatch.run_on):
            given = {"platform": "tpu"} if run is dispatch.run_on else {}
            traced = jax.jit(lambda x, run=run, given=given: run(BY_CHIP, x, x, Spec(1), **given))
            text = traced.trace(X).lower(lowering_platforms=("tpu",)).as_text()
            assert f"dense<{wanted}" in text


def test_arrays_with_explicit_sharding_are_computed_alike_on_all_chips():
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jax.device_put(X, jax.NamedSharding(mesh, jax.P("a")))
    for array, count in ((x, 4), (X, 6)):
        with marking():
            jaxpr = jax.make_jaxpr(lambda x: dispatch.run(BY_CHIP, x, x, Spec(1), None))(array)
        (record,) = (
            site.eqn.params["record"] for site in walk(jaxpr) if "record" in site.eqn.params
        )
        assert len(record.choices) == count


def test_the_last_row_is_chosen_without_being_asked():
    table = (*TABLE[:1], Implementation("last", constant(3.0), never))
    assert dispatch.select_row(table, X, X, 1, "tpu")[0].name == "last"


def test_the_platform_is_chosen_when_the_program_is_compiled():
    def run(x, spec):
        return dispatch.run(TABLE, x, x, spec, None)

    np.testing.assert_array_equal(jax.jit(run, static_argnums=1)(X, Spec(4)), np.ones((2, 3)))
    for platform, constants in {"cpu": "1.0", "tpu": "3.0", "cuda": "3.0"}.items():
        traced = jax.jit(run, static_argnums=1).trace(X, Spec(4))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert f"dense<{constants}" in text
    # One choice for all platforms needs no conditional.
    text = str(jax.make_jaxpr(lambda x: dispatch.run(TABLE[2:], x, x, Spec(4), None))(X))
    assert "platform_index" not in text


@pytest.mark.parametrize("name, value", [("for cpu", 1), ("small", 2), ("last", 3)])
def test_a_row_can_be_forced_on_every_platform(name, value):
    got = dispatch.run(TABLE, X, X, Spec(1), name)
    np.testing.assert_array_equal(got, np.full((2, 3), value))


def test_forcing_fails_loudly():
    with pytest.raises(
        ValueError,
        match="must be one of impossible, for cpu, small, last, or None to choose; got 'fast'",
    ):
        dispatch.run(TABLE, X, X, Spec(1), "fast")
    with pytest.raises(
        ValueError,
        match=r"implementation='small' cannot run float32 \(2, 3\) by float32 \(2, 3\): too long. "
        "Choose for cpu or last, or None.",
    ):
        dispatch.run(TABLE, X, X, Spec(9), "small")


# The native kernels do not have a form for 2 bits.
WIDE = ArrayConfig(format=INT2)


@pytest.mark.parametrize("rows", [1, M])
def test_every_row_of_the_table_of_products_gives_the_same_numbers(rows):
    q = weight(WIDE, (K, 512)).reorder((-1, -2))
    x = quantize(normal(rows, K), ArrayConfig(), axis=1)
    names = ("blocks", "integer", "scaled", "dequantize", None)
    products = jax.jit(lambda x, q: [matmul(x, q, implementation=name) for name in names])
    for got in products(x, q):
        assert_product(got, "mk,kn->mn", x, q)


def lowers_to_a_loop(platform, x, q):
    traced = jax.jit(matmul).trace(x, q)
    return "stablehlo.while" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform, wanted", [("cpu", True), ("tpu", False), ("cuda", False)])
def test_only_a_cpu_multiplies_in_blocks(platform, wanted):
    q = weight(WIDE, (K, 512)).reorder((-1, -2))
    assert lowers_to_a_loop(platform, normal(M, K), q) == wanted


def rows_by(config, rows=M, columns=512, order=(-1, -2)):
    return normal(rows, K), weight(config, (K, columns)).reorder(order)


NOT_IN_BLOCKS = {
    "products of 8-bit codes need no blocks": (
        quantize(normal(M, K), ArrayConfig(), axis=1),
        rows_by(ArrayConfig())[1],
    ),
    "more than 128 rows": rows_by(WIDE, rows=129),
    "fewer than 512 columns": rows_by(WIDE, columns=511),
    "not stored with one free axis, first": rows_by(WIDE, order=None),
    "the right operand is not quantized": (
        rows_by(WIDE)[1].reorder(None),
        normal(512, M),
    ),
    "blocks of scales do not divide 256": rows_by(
        Case(ArrayConfig(group_size=(K, 3)), (0, 1)), columns=513
    ),
}


@pytest.mark.parametrize("reason", NOT_IN_BLOCKS)
def test_blocks_are_for_few_rows_by_many_columns_stored_first(reason):
    x, q = NOT_IN_BLOCKS[reason]
    with pytest.raises(ValueError, match=f"implementation='blocks' cannot run .*{reason}"):
        matmul(x, q, implementation="blocks")
    assert not lowers_to_a_loop("cpu", x, q)
    assert_product(matmul(x, q), "mk,kn->mn", x, q)


def test_blocks_reach_up_to_128_rows():
    assert lowers_to_a_loop("cpu", *rows_by(WIDE, rows=128))
    blocks = Case(ArrayConfig(format=INT2, group_size=(K, 4), symmetric=False), (0, 1))
    assert lowers_to_a_loop("cpu", *rows_by(blocks))


NOT_AS_INTEGERS = {
    "an operand of float32 does not have codes": (normal(M, K), weight(ArrayConfig())),
    "fp8_e4m3 codes are not integers within int8": (
        quantize(normal(M, K), ArrayConfig(), axis=1),
        weight(ArrayConfig(format=FP8_E4M3)),
    ),
    r"scales \(4, 24\) change along the contracted axes": (
        quantize(normal(M, K), ArrayConfig(), axis=1),
        weight(ArrayConfig(group_size=16)),
    ),
    r"scales \(5, 4\) change along the contracted axes": (
        quantize(normal(M, K), ArrayConfig(group_size=16), axis=1),
        weight(ArrayConfig()),
    ),
}


@pytest.mark.parametrize("reason", NOT_AS_INTEGERS)
def test_unsupported_integer_raises_with_the_reason_and_alternatives(reason):
    x, q = NOT_AS_INTEGERS[reason]
    with pytest.raises(ValueError, match=f"cannot run .* by QTensor.*: {reason}. Choose .*dequant"):
        matmul(x, q, implementation="integer")


def test_unknown_implementations_raise_in_every_operation():
    with pytest.raises(
        ValueError,
        match=r"one of native, pallas, triton, blocks, integer, scaled, fused, dequantize.*'cud",
    ):
        matmul(normal(M, K), weight(ArrayConfig()), implementation="cudnn")
