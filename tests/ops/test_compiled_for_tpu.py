"""What the TPU's compiler makes of products. Needs libtpu, and no TPU; nothing runs."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from benchmarks import tpu_compiler
from benchmarks.tpu_text import Program
from jaxquant import W4A16, W8A8, ArrayConfig, Rule, explain, matmul, quantize, tree
from jaxquant.jaxprs import tpu_generation

pytestmark = pytest.mark.usefixtures("libtpu")
K, N = 1024, 1536


def weights(scheme, dtype=jnp.bfloat16):
    """What `tree.quantize` makes of (K, N) weights for a TPU, as shapes."""
    rule = [Rule("*", scheme, axis=-2)]
    return jax.eval_shape(
        lambda w: tree.quantize({"kernel": w}, rule, platform="tpu")["kernel"],
        jax.ShapeDtypeStruct((K, N), dtype),
    )


def compiled(chip, run, rows, *others):
    x = jax.ShapeDtypeStruct((rows, K), jnp.bfloat16)
    return Program(tpu_compiler.compile_for(chip, run, x, *others).as_text() or "")


def products(program):
    """Element types (lhs, rhs, result) of every product, in fusions and outside."""
    return [
        (*(computation[name].arrays[0].dtype for name in i.operands), i.arrays[0].dtype)
        for computation in program.computations.values()
        for i in computation.values()
        if i.opcode in ("convolution", "dot")
    ]


def taking_weights(program):
    """Scheduled instructions that take the weights' codes, or a view of them."""
    return [
        i
        for computation, i in program.scheduled()
        if i.opcode != "bitcast" and not i.opcode.startswith("copy-")
        for name in i.operands
        if any((a.dtype, a.size) == ("s4", K * N) for a in computation[name].arrays)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_w8a8_multiplies_int8_by_int8_into_int32(chip):
    program = compiled(chip, matmul, 64, weights(W8A8))
    assert products(program) == [("s8", "s8", "s32")]


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("chip, rows", [("v5e", 8), ("v5e", 512), ("v6e", 8), ("v6e", 512)])
def test_xla_reads_grouped_int4_weights_once_at_half_a_byte(chip, rows):
    program = compiled(chip, partial(matmul, implementation="fused"), rows, weights(W4A16))
    assert ("s4", (K, N)) in [(a.dtype, a.shape) for _, i in program.scheduled() for a in i.arrays]
    # No second pass, and no dequantized copy, not even in the chip's own memory.
    (product,) = taking_weights(program)
    assert product.opcode == "fusion"
    assert all(a.size < K * N for a in product.arrays)
    assert len(products(program)) == 1


def kernels(program):
    """Operands' types of every Pallas kernel."""
    return [
        tuple(computation[name].arrays[0].dtype for name in i.operands)
        for computation, i in program.scheduled()
        if "tpu_custom_call" in i.attributes
    ]


# By this process, which has no TPU.
@pytest.mark.some_rows(1)
@pytest.mark.parametrize(
    "chip, rows, dtypes",
    [("v5e", 8, ["bf16 s4 f32"]), ("v5e", 300, []), ("v6e", 512, ["bf16 s4 f32"])],
)
def test_the_chip_that_is_compiled_for_decides_about_kernels(chip, rows, dtypes):
    q = weights(W4A16)
    assert [" ".join(k) for k in kernels(compiled(chip, matmul, rows, q))] == dtypes
    (row,) = explain(matmul, jax.ShapeDtypeStruct((rows, K), jnp.bfloat16), q, platform=chip)
    assert row.implementation == ("pallas" if dtypes else "fused")


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("chip, rows", [("v5e", 8), ("v5e", 512), ("v6e", 64), ("v6e", 512)])
def test_three_products_quantize_few_or_many_rows_by_one_kernel(chip, rows):
    def run(x, *weights):
        return [matmul(x, w) for w in weights]

    program = compiled(chip, run, rows, *[weights(W8A8)] * 3)
    assert kernels(program) == [("bf16",)]
    assert products(program) == [("s8", "s8", "s32")] * 3


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("is_before", [True, False], ids=["before", "by each product"])
def test_other_rows_of_three_products_are_quantized_once(chip, is_before):
    def run(x, *weights):
        x = quantize(x, ArrayConfig(), axis=-1) if is_before else x
        return [matmul(x, w) for w in weights]

    program = compiled(chip, run, 100, *[weights(W8A8)] * 3)
    rounded = [
        i
        for computation in program.computations.values()
        for i in computation.values()
        if i.opcode.startswith("round-nearest")
    ]
    assert [i.arrays[0].shape for i in rounded] == [(100, K)]
    assert products(program) == [("s8", "s8", "s32")] * 3


def test_devices_that_are_described_have_their_generation():
    found = [tpu_generation(tpu_compiler.device(chip)) for chip in tpu_compiler.CHIPS]
    assert found == ["v5e", "v6e", "7x"]
