"""Functions of a parameter, each of which meets one rule of `lift`, and how it is quantized."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxquant import INT4, INT8, MXFP4, NF4, NVFP4, ArrayConfig, quantize
from jaxquant.core import scale_values

ROWS, K, N = 3, 64, 96
INDEX = jnp.asarray(np.array([5, 0, 63, 7], np.int32))


def normal(*shape, seed=7):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def rows(length=K):
    return normal(ROWS, length)


def stacked_rows(w):
    """Two halves of w as a stack of layers (2, 32, 96)."""
    return w.reshape(2, K // 2, N)


def scanned(w, **options):
    def step(x, layer):
        return jnp.tanh(x @ layer @ layer.T), jnp.sum(x @ layer)

    return lax.scan(step, rows(K // 2), stacked_rows(w), **options)


@jax.custom_vjp
def with_own_gradient(x, w):
    return x @ w


with_own_gradient.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


@jax.custom_jvp
def with_own_derivative(w):
    return rows() @ w


with_own_derivative.defjvps(lambda t, out, w: rows() @ t)


def looped(w):
    def step(carry):
        i, x = carry
        return i + 1, jnp.tanh(x @ w @ w.T)

    return lax.while_loop(lambda carry: carry[0] < 3, step, (0, rows()))[1]


def convolved(w):
    kernel = w.reshape(4, 16, N)
    image = rows(8 * 16).reshape(ROWS, 8, 16)
    return lax.conv_general_dilated(
        image, kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )


# By name: a function of a (64, 96) parameter that does not have to dequantize it, however it is
# grouped along its first axis.
ANY_GROUPS = {
    "dot_general": lambda w: rows() @ w,
    "dot_general on the left": lambda w: jnp.einsum("kn,bk->nb", w, rows()),
    "transpose": lambda w: rows(N) @ w.T,
    "convert_element_type": lambda w: rows().astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
    "gather": lambda w: jnp.take(w, INDEX, axis=0, mode="clip"),
    "gather of columns": lambda w: jnp.take(w, INDEX, axis=1, fill_value=0.0),
    "gather with a fill value": lambda w: jnp.take(w, INDEX + 60, axis=0, fill_value=7.0),
    "gather with negative indices": lambda w: w[jnp.array([-1, 2, 70])],
    "gather of rows of indices": lambda w: w.at[INDEX.reshape(2, 2)].get(mode="fill"),
    "gather under vmap": lambda w: jax.vmap(lambda i: w[i])(INDEX),
    "slice of columns": lambda w: rows() @ w[:, 8:40:2],
    "slice of groups": lambda w: rows(32) @ w[32:],
    "dynamic_slice": lambda w: rows() @ lax.dynamic_slice_in_dim(w, INDEX[0], 7, 1),
    "split": lambda w: sum(rows() @ part for part in jnp.split(w, 3, axis=1)),
    "expand_dims and squeeze": lambda w: rows() @ w[None, :, None, :].squeeze((0, 2)),
    "broadcast_in_dim": lambda w: jnp.einsum("bk,akn->abn", rows(), jnp.broadcast_to(w, (2, K, N))),
    "reshape of columns": lambda w: jnp.einsum("bk,khd->bhd", rows(), w.reshape(K, 8, 12)),
    "reshape after transpose": lambda w: jnp.einsum("bk,hdk->bhd", rows(), w.T.reshape(8, 12, K)),
    "reshape of groups": lambda w: jnp.einsum("gk,gkn->gn", rows(32)[:2], stacked_rows(w)),
    "concatenate": lambda w: rows() @ jnp.concatenate([w, w[:, :16]], axis=1),
    "stack": lambda w: jnp.einsum("bk,akn->abn", rows(), jnp.stack([w, w])),
    "copy": lambda w: rows() @ jnp.copy(w),
    "rev": lambda w: rows() @ w[::-1, ::-1],
    "stop_gradient": lambda w: rows() @ lax.stop_gradient(w),
    "name": lambda w: rows() @ checkpoint_name(w, "w"),
    "optimization_barrier": lambda w: rows() @ lax.optimization_barrier((w, 1.0))[0],
    "jit": lambda w: jax.jit(lambda w: rows() @ w)(w),
    "remat": jax.checkpoint(lambda w: jnp.sin(rows() @ w)),
    "custom_vjp": lambda w: with_own_gradient(rows(), w),
    "custom_jvp": with_own_derivative,
    "cond": lambda w: lax.cond(
        rows()[0, 0] > 0, lambda w: rows() @ w, lambda w: 2 * (rows() @ w), w
    ),
    "platform_dependent": lambda w: lax.platform_dependent(
        w, cpu=lambda w: rows() @ w, default=lambda w: 2 * (rows() @ w)
    ),
    "platform_dependent by default": lambda w: lax.platform_dependent(
        w, tpu=lambda w: 2 * (rows() @ w), default=lambda w: rows() @ w
    ),
    "while": looped,
    "scan": scanned,
    "scan in reverse": lambda w: scanned(w, reverse=True),
    "scan unrolled": lambda w: scanned(w, unroll=2),
    "grad inside": lambda w: jax.grad(lambda x: jnp.sum(jnp.sin(x @ w)))(rows()),
    "vmap inside": lambda w: jax.vmap(lambda x: x @ w)(rows()),
    "conv_general_dilated": convolved,
}
# These change the scale, which is rounded once more.
SCALING = {
    "mul by a scalar": lambda w: rows() @ (w * 0.37),
    "div by a scalar": lambda w: rows() @ (w / jnp.float32(3.0)),
    "mul by one number per column": lambda w: rows() @ (w * (1 + rows(N)[:1])),
    "neg": lambda w: rows() @ -w,
}
# These need a float array.
DEQUANTIZED = {
    "tanh": lambda w: rows() @ jnp.tanh(w),
    "add": lambda w: rows() @ (w + 1.0),
    "cumsum": lambda w: rows() @ jnp.cumsum(w, axis=0),
    "select_n": lambda w: rows() @ jnp.where(w > 0, w, 0.0),
    "carried by a loop": lambda w: lax.fori_loop(0, 2, lambda i, w: w * 0.5, w),
    "concatenate with a float array": lambda w: (
        rows(2 * K) @ jnp.concatenate([w, jnp.ones((K, N))])
    ),
    "convert to integers": lambda w: w.astype(jnp.int32),
}


def _config(**fields):
    return ArrayConfig(**fields)


QUANTIZED = {
    "int8": (_config(), 0),
    "int4 g32": (_config(format=INT4, group_size=32), 0),
    "int4 g16 asymmetric": (_config(format=INT4, group_size=16, symmetric=False), 0),
    "nf4 g32 nested": (_config(format=NF4, group_size=32, scale_dtype="float8_e4m3fn"), 0),
    "int8 per tensor": (_config(format=INT8, per_tensor=True), 0),
    "mxfp4": (_config(format=MXFP4), 0),
    "nvfp4": (_config(format=NVFP4), 0),
}


def parameter(name, is_swapped=False):
    """The (64, 96) parameter, quantized."""
    config, axis = QUANTIZED[name]
    x = np.random.default_rng(3).normal(size=(K, N)).astype(np.float32)
    q = quantize(x, config, axis)
    if not config.symmetric:
        q = dataclasses.replace(q, offset=0.3 * scale_values(q.scale))
    return q.reorder((-1, -2)) if is_swapped else q
