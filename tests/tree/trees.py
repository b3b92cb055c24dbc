"""Trees of parameters shared by the tests of this folder, and how to compare them."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import QTensor


class Dense(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A module as in Equinox: arrays, other modules and static fields."""

    kernel: Any
    bias: Any
    width: int = dataclasses.field(default=32, metadata={"static": True})


class State:
    """A node as in Flax: a custom pytree with named children."""

    def __init__(self, children):
        self.children = children

    def __repr__(self):
        return f"State({self.children})"


jax.tree_util.register_pytree_with_keys(
    State,
    lambda s: ([(jax.tree_util.DictKey(k), v) for k, v in s.children.items()], tuple(s.children)),
    lambda names, children: State(dict(zip(names, children, strict=True))),
)


def normal(*shape, seed=0):
    """float32 values whose rows have different magnitudes."""
    random = np.random.default_rng(seed)
    return (random.normal(size=shape) * random.uniform(0.5, 2, (*shape[:-1], 1))).astype(np.float32)


def parameters():
    """A model's tree: an embedding, two stacked layers, an output, and unquantized leaves."""
    return {
        "embed": {"table": jnp.asarray(normal(48, 64))},
        "layers": {
            "norm": {"scale": jnp.asarray(1 + normal(2, 64, seed=1))},
            "up": {"kernel": jnp.asarray(normal(2, 64, 128, seed=2)), "bias": jnp.ones((2, 128))},
        },
        "out": [jnp.asarray(normal(64, 32, seed=3)), jnp.asarray(normal(32, seed=4))],
        "steps": jnp.arange(6, dtype=jnp.int32).reshape(2, 3),
    }


def is_quantized(x):
    return isinstance(x, QTensor)


def leaves_of(tree):
    """Leaves by path; a QTensor is one leaf."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def assert_equal_trees(found, wanted):
    """Compares structure, static fields and arrays bit for bit, including NaN and negative zero."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.shape(a) == np.shape(b)
        assert getattr(a, "dtype", type(a)) == getattr(b, "dtype", type(b))
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
