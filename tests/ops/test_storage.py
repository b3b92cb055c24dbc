import jax
import numpy as np
import pytest

from jaxquant import INT4, ArrayConfig, best_order, matmul

from ..cases import Case
from .products import assert_product, normal, quantized

KERNEL, TURNED = (6, 8), (8, 6)
# (shape, case, platform, order).
ORDERS = [
    (KERNEL, Case(ArrayConfig()), "cpu", (-1, -2)),
    (KERNEL, Case(ArrayConfig()), "gpu", (-1, -2)),
    (KERNEL, Case(ArrayConfig()), "tpu", None),
    (TURNED, Case(ArrayConfig(), 1), "cpu", None),
    (TURNED, Case(ArrayConfig(), 1), "gpu", None),
    (TURNED, Case(ArrayConfig(), 1), "tpu", (-1, -2)),
    (KERNEL, Case(ArrayConfig(group_size=3)), "cpu", (-1, -2)),
    (KERNEL, Case(ArrayConfig(group_size=3)), "gpu", (-1, -2)),
    (KERNEL, Case(ArrayConfig(group_size=3)), "tpu", None),
    (TURNED, Case(ArrayConfig(group_size=3), 1), "cpu", None),
    (TURNED, Case(ArrayConfig(group_size=3), 1), "tpu", (-1, -2)),
    # More axes: a query kernel (D, H, K), and a stack of matrices.
    ((6, 4, 8), Case(ArrayConfig()), "cpu", (-2, -1, -3)),
    ((6, 4, 8), Case(ArrayConfig(group_size=3)), "tpu", None),
    ((3, 6, 8), Case(ArrayConfig(), 1), "cpu", (-1, -2)),
    ((3, 8, 6), Case(ArrayConfig(group_size=3), 2), "tpu", (-1, -2)),
    ((6,), Case(ArrayConfig(group_size=3)), "tpu", None),
    ((6,), Case(ArrayConfig()), "cpu", None),
    # Several axes or none: the order stays.
    ((3, 2, 6, 8), Case(ArrayConfig(), (0, 1, 2)), "cpu", None),
    (KERNEL, Case(ArrayConfig(per_tensor=True)), "cpu", None),
    (KERNEL, Case(ArrayConfig(group_size=1)), "cpu", None),
]


@pytest.mark.parametrize("shape, case, platform, order", ORDERS)
def test_the_best_order_is_that_of_the_table(shape, case, platform, order):
    q = jax.tree.map(np.asarray, quantized(normal(*shape), *case))
    assert best_order(q, platform) == order
    # However the array is stored now.
    turned = q.reorder(tuple(range(-q.ndim, 0))[::-1])
    axes = np.flatnonzero(np.array(q.scale.shape) < shape)
    is_last = list(turned.stored_axes(axes)) == [q.ndim - 1]
    is_kept = is_last and platform != "tpu"
    assert best_order(turned, platform) == (turned.order if len(axes) != 1 or is_kept else order)


# (shape, case, contracted, platform, order): kernels of attention with several axes.
CONTRACTED = [
    ((4, 6, 8), Case(ArrayConfig(), (0, 1)), (0, 1), "cpu", (-1, -3, -2)),
    ((4, 6, 8), Case(ArrayConfig(), (0, 1)), (1, 0), "gpu", (-1, -3, -2)),
    ((4, 6, 8), Case(ArrayConfig(), (0, 1)), (0, 1), "tpu", None),
    ((4, 6, 8), Case(ArrayConfig(group_size=3), 1), (-3, -2), "cpu", (-1, -3, -2)),
    ((4, 6, 8), Case(ArrayConfig(group_size=3), 1), (0, 1), "tpu", None),
    ((5, 4, 6, 8), Case(ArrayConfig(), (1, 2)), (1, 2), "cpu", (-1, -3, -2)),
    ((8, 4, 6), Case(ArrayConfig(), (1, 2)), (1, 2), "cpu", None),
    ((8, 4, 6), Case(ArrayConfig(group_size=3), 2), (1, 2), "tpu", (-2, -1, -3)),
    ((4, 8, 6), Case(ArrayConfig(group_size=3), 2), (0, 2), "tpu", (-3, -1, -2)),
    ((4, 8, 6), Case(ArrayConfig(), (0, 2)), (0, 2), "cpu", (-2, -3, -1)),
    ((4, 6), Case(ArrayConfig(), (0, 1)), (0, 1), "tpu", None),
]


@pytest.mark.parametrize("shape, case, contracted, platform, order", CONTRACTED)
def test_the_best_order_for_several_contracted_axes(shape, case, contracted, platform, order):
    q = jax.tree.map(np.asarray, quantized(normal(*shape), *case))
    assert best_order(q, platform, contracted) == order
    stored = q.reorder(order)
    assert best_order(stored, platform, contracted) == order
    if platform != "tpu":
        # Without the axes, too, the order of what is stored well stays.
        assert best_order(stored, platform) == order


def test_the_best_order_on_cpu_puts_the_contracted_axis_last():
    q = quantized(normal(6, 4, 8), ArrayConfig(format=INT4, group_size=3))
    stored = q.reorder(best_order(q, "cpu"))
    assert stored.codes.shape == (4, 8, 6)
    assert stored.scale.shape == (4, 8, 2)


def test_the_order_for_another_platform_does_not_change_values():
    q, x = quantized(normal(64, 8), ArrayConfig(group_size=16)), normal(5, 64)
    for platform in ("cpu", "tpu"):
        assert_product(jax.jit(matmul)(x, q.reorder(best_order(q, platform))), "mk,kn->mn", x, q)


def test_an_unknown_platform_raises():
    with pytest.raises(ValueError, match="platform must be cpu, gpu, tpu; got 'npu'"):
        best_order(quantized(normal(6, 8), ArrayConfig()), "npu")
