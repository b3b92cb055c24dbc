"""What the TPU's compiler makes of an update of quantized states. Nothing runs."""

import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks import tpu_compiler
from jaxquant import training
from jaxquant.training import STATE_4_BIT, STATE_8_BIT

pytestmark = pytest.mark.usefixtures("libtpu")
SHAPE = (2048, 2048)


def peak_and_state(optimizer):
    """Bytes of a step whose parameters and states are donated, and of the states."""
    device = jax.sharding.SingleDeviceSharding(tpu_compiler.device("v5e"))
    params = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    args = params, jax.eval_shape(optimizer.init, params), params
    placed = jax.tree.map(lambda x: x.update(sharding=device), args)
    memory = jax.jit(step, donate_argnums=(0, 1)).lower(*placed).compile().memory_analysis()
    assert memory is not None
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes
    total += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return total, training.state_bytes(args[1])


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("rules", [STATE_8_BIT, STATE_4_BIT], ids=["8", "4"])
def test_an_update_needs_as_much_less_memory_as_the_states_save(rules):
    """Blocks along the second to last axis: along the last one, it took five more copies."""
    with jax.numpy_dtype_promotion("standard"):
        adamw = optax.adamw(1e-3)
        full, full_state = peak_and_state(adamw)
        peak, state = peak_and_state(training.quantized_state(adamw, rules))
    saved = full_state - state
    assert saved > 0.7 * full_state
    assert peak <= full - saved + 0.02 * full
