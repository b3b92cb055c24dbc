"""Runs the examples in docstrings."""

import doctest
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxquant as jq

NAMES = {"jax": jax, "jnp": jnp, "np": np, "optax": optax, "jq": jq}


def examples_of(name, value, names):
    """The examples in a docstring and in those of the methods that a class defines itself."""
    finder = doctest.DocTestFinder(exclude_empty=False)
    # Dataclasses, and jitted functions, which are not of the type that doctest looks for.
    value = inspect.unwrap(value) if not inspect.isclass(value) else value
    return [test for test in finder.find(value, name, globs=dict(names)) if test.examples]


def public(module):
    """Functions and classes by name. A jitted function is callable, and a type alias is neither."""
    found = {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}
    return {
        name: value
        for name, value in found.items()
        if callable(value) and (inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value)))
    }


def run_examples(name, value, **names):
    """Runs them, with `names` beside NAMES; it is an error if there are none."""
    tests = examples_of(name, value, NAMES | names)
    assert any(test.name == name for test in tests), f"{name} shows no example (>>>)"
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for test in tests:
            printed = []
            runner.run(test, out=printed.append)
            assert not printed, "".join(printed)
