"""The path from a public name to the multiplication: at most four files, none entered twice."""

import itertools
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

import jaxquant
from jaxquant import W8A8, Rule, dot_general, einsum, matmul, tree

ROOT = f"{pathlib.Path(jaxquant.__file__).parent}/"
PATH = ["ops/dot.py", "ops/dispatch.py", "ops/rows/integer.py", "kernels/integer_dot.py"]
# A number of rows that no call before had: what JAX has traced once, it does not trace again.
NEW_ROWS = itertools.count(61)
W = tree.quantize({"w": jnp.ones((256, 512))}, [Rule("w", W8A8)], platform="cpu")["w"]
NUMBERS = (((1,), (0,)), ((), ()))
CALLS = {
    "matmul": (lambda x: matmul(x, W, implementation="integer"), PATH),
    "dot_general": (lambda x: dot_general(x, W, NUMBERS, implementation="integer"), PATH),
    "einsum": (
        lambda x: einsum("mk,kn->mn", x, W, implementation="integer"),
        ["ops/einsum.py", *PATH],
    ),
}


def names_on_stack(frame):
    """(file, function) of ours on the stack, the outermost first."""
    found = []
    while frame is not None:
        if (path := frame.f_code.co_filename).startswith(ROOT):
            found.append((path.removeprefix(ROOT), frame.f_code.co_name))
        frame = frame.f_back
    return found[::-1]


def traced(function: Callable[[jax.Array], object]):
    """All calls of ours while a function is traced, and the stack at its integer products."""
    calls, stacks = [], []

    def profile(frame, event, _):
        path = frame.f_code.co_filename
        if event != "call" or not path.startswith(ROOT):
            return
        calls.append((path.removeprefix(ROOT), frame.f_code.co_name))
        if calls[-1] == ("kernels/integer_dot.py", "_dot"):
            stacks.append(names_on_stack(frame))

    x = jnp.ones((next(NEW_ROWS), 256))
    sys.setprofile(profile)
    try:
        jax.make_jaxpr(lambda: function(x))()
    finally:
        sys.setprofile(None)
    return calls, stacks


def entered(names):
    """Files in the order in which they are entered, again where another lay between."""
    files = [file for file, _ in names]
    return [f for before, f in zip([None, *files], files, strict=False) if f != before]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", CALLS)
def test_the_path_to_the_multiplication_is_short_and_straight(name):
    function, path = CALLS[name]
    calls, stacks = traced(function)
    assert stacks
    assert all(entered(stack) == path for stack in stacks), stacks
    checks = [call for call in calls if call == ("ops/operands.py", "as_operands")]
    assert len(checks) == 1
    assert "ops/record.py" not in {file for file, _ in calls}, "records are for explain"


if __name__ == "__main__":
    calls, stacks = traced(CALLS["matmul"][0])
    for file, function in calls:
        print(f"{file:24} {function}")
    print("The path:", " > ".join(f"{file} {function}" for file, function in stacks[-1]))
    print(f"{len({f for f, _ in calls})} files, {len(entered(calls))} entries, {len(calls)} calls")
