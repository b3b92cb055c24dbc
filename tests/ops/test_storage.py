import jax
import numpy as np
import pytest

from jaxquant import INT4, ArrayConfig, best_order, matmul, quantize

from .products import assert_product, normal

KERNEL, TURNED = (6, 8), (8, 6)
# (shape, config, platform, order).
ORDERS = [
    (KERNEL, ArrayConfig(axis=0), "cpu", (-1, -2)),
    (KERNEL, ArrayConfig(axis=0), "gpu", (-1, -2)),
    (KERNEL, ArrayConfig(axis=0), "tpu", None),
    (TURNED, ArrayConfig(axis=1), "cpu", None),
    (TURNED, ArrayConfig(axis=1), "gpu", None),
    (TURNED, ArrayConfig(axis=1), "tpu", None),
    (KERNEL, ArrayConfig(axis=0, group_size=3), "cpu", (-1, -2)),
    (KERNEL, ArrayConfig(axis=0, group_size=3), "gpu", (-1, -2)),
    (KERNEL, ArrayConfig(axis=0, group_size=3), "tpu", None),
    (TURNED, ArrayConfig(axis=1, group_size=3), "cpu", None),
    (TURNED, ArrayConfig(axis=1, group_size=3), "tpu", (-1, -2)),
    # More axes: a query kernel (D, H, K), and a stack of matrices.
    ((6, 4, 8), ArrayConfig(axis=0), "cpu", (-2, -1, -3)),
    ((6, 4, 8), ArrayConfig(axis=0, group_size=3), "tpu", None),
    ((3, 6, 8), ArrayConfig(axis=1), "cpu", (-1, -2)),
    ((3, 8, 6), ArrayConfig(axis=2, group_size=3), "tpu", (-1, -2)),
    ((6,), ArrayConfig(axis=0, group_size=3), "tpu", None),
    ((6,), ArrayConfig(axis=0), "cpu", None),
    # Several axes or none: the order stays.
    ((3, 2, 6, 8), ArrayConfig(axis=(0, 1, 2)), "cpu", None),
    (KERNEL, ArrayConfig(axis=None), "cpu", None),
    (KERNEL, ArrayConfig(axis=0, group_size=1), "cpu", None),
]


@pytest.mark.parametrize("shape, config, platform, order", ORDERS)
def test_the_best_order_is_that_of_the_table(shape, config, platform, order):
    q = quantize(normal(*shape), config)
    assert best_order(q, platform) == order
    # However the array is stored now.
    turned = q.reorder(tuple(range(-q.ndim, 0))[::-1])
    is_free = len(shape) - (np.array(q.scale.shape) == shape).sum() != 1
    tpu_keeps = platform == "tpu" and config.group_size is None
    assert best_order(turned, platform) == (turned.order if is_free or tpu_keeps else order)


def test_the_best_order_on_cpu_puts_the_contracted_axis_last():
    q = quantize(normal(6, 4, 8), ArrayConfig(axis=0, format=INT4, group_size=3))
    stored = q.reorder(best_order(q, "cpu"))
    assert stored.codes.shape == (4, 8, 6)
    assert stored.scale.shape == (4, 8, 2)


def test_the_order_for_another_platform_changes_no_number():
    q, x = quantize(normal(64, 8), ArrayConfig(axis=0, group_size=16)), normal(5, 64)
    for platform in ("cpu", "gpu", "tpu"):
        assert_product(jax.jit(matmul)(x, q.reorder(best_order(q, platform))), "mk,kn->mn", x, q)


def test_an_unknown_platform_is_refused():
    with pytest.raises(ValueError, match="platform must be cpu, gpu, tpu; got 'npu'"):
        best_order(quantize(normal(6, 8), ArrayConfig()), "npu")
