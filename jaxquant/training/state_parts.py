"""One part of an update: decodes what it needs of a quantized state, and encodes the results."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core import AbsMax, ArrayConfig, QTensor, Seed
from ..jaxprs import ElementwisePart, is_sharded, on_one_cpu, steps_of, varying_axes
from ..kernels import cpu
from .blockwise import Blockwise, quantize_blocks
from .state_blocks import layout_of

# Rows of fewer elements are left to XLA.
_LEAST_ROW = 32


@dataclasses.dataclass(frozen=True, eq=False)
class StatePart:
    """Elements of an update that are computed together.

    Attributes:
        part: the equations.
        stored: which of its arrays are `Blockwise`, by place; the place of the result that replaces
            each, and its config, or None if the part does not compute it.
    """

    part: ElementwisePart
    stored: Mapping[int, tuple[int, ArrayConfig] | None]

    @property
    def configs(self) -> dict[int, ArrayConfig]:
        """The configs of the results that are stored, by place."""
        return dict(filter(None, self.stored.values()))

    def compute(
        self,
        arrays: Sequence[Any],
        scalars: Sequence[jax.Array],
        seeds: Mapping[int, Seed],
        after: jax.Array,
    ) -> dict[int, Any]:
        """The results by place: a Blockwise for each that is stored.

        Args:
            arrays, scalars: those of the part.
            seeds: of the noise of results, by place; empty to round to nearest.
            after: array that is computed before this starts, where native kernels compute it.
        """
        args = arrays, scalars, seeds, after
        by_xla, natively = partial(_by_xla, self), partial(_natively, self)
        leaves = jax.tree.leaves(args)
        if any(map(is_sharded, leaves)) or len(set(map(varying_axes, leaves))) > 1:
            return by_xla(*args)

        def on_cpu(*args):
            return on_one_cpu(natively, by_xla, *args)

        # Kernels do not have derivatives.
        @jax.custom_jvp
        def run(*args):
            return lax.platform_dependent(*args, cpu=on_cpu, default=by_xla)

        @run.defjvp
        def _(primals, tangents):
            return jax.jvp(by_xla, primals, tangents)

        return run(*args)


def is_supported(block: Blockwise) -> bool:
    """Whether the native kernels decode it and encode arrays alike."""
    q, codes = block.q, block.q.codes
    if block.padding is not None or q.dtype != jnp.float32:
        return False
    if q.offset is not None or isinstance(q.scale, QTensor) or q.scale.dtype != jnp.float32:
        return False
    is_short = codes.shape[-1] < _LEAST_ROW
    return not is_short and cpu.why_unsupported_blocks(codes.shape, q.format) is None


def is_stored_alike(
    block: Blockwise, config: ArrayConfig | None, dtype: jax.typing.DTypeLike
) -> bool:
    """Whether the kernels quantize what replaces the block, of this dtype, with a config alike."""
    q = block.q
    if config is None or config.format != q.format or config.range != AbsMax():
        return False
    if dtype != q.dtype:
        return False
    return config.stored_scale_dtype == q.scale.dtype and (
        layout_of(q.shape, config).blocks == _blocks(q)
    )


def _by_xla(
    plan: StatePart,
    arrays: Sequence[Any],
    scalars: Sequence[jax.Array],
    seeds: Mapping[int, Seed],
    after: jax.Array,
) -> dict[int, Any]:
    """The results of whole arrays."""
    del after
    values = [x.dequantize() if isinstance(x, Blockwise) else x for x in arrays]
    results = dict(zip(plan.part.places, plan.part.compute(values, scalars), strict=True))
    for place, config in plan.configs.items():
        results[place] = quantize_blocks(results[place], config, seeds.get(place))
    return results


def _natively(
    plan: StatePart,
    arrays: Sequence[Any],
    scalars: Sequence[jax.Array],
    seeds: Mapping[int, Seed],
    after: jax.Array,
) -> dict[int, Any]:
    """The results of the native kernel, if it has all operations; codes are overwritten."""
    part, steps = plan.part, steps_of(plan.part, scalars)
    if steps is None or len({_blocks(arrays[at].q) for at in plan.stored}) > 1:
        return _by_xla(plan, arrays, scalars, seeds, after)
    inputs = [_as_input(x) for x in arrays]
    outputs: list[Any] = list(part.dtypes)
    for at, found in plan.stored.items():
        if found is not None:
            outputs[part.places.index(found[0])] = at
    unused = jnp.zeros(2, jnp.uint32)
    words = [seeds[place].words if place in seeds else unused for place in part.places]
    found = cpu.update_blocks(
        steps.steps, inputs, steps.scalars, outputs, words if seeds else None, after
    )
    results = (Blockwise(x) if isinstance(x, QTensor) else x for x in found)
    return dict(zip(part.places, results, strict=True))


def _as_input(x: Any) -> jax.Array | QTensor:
    if isinstance(x, Blockwise):
        return x.q
    return x.astype(jnp.float32) if x.dtype == jnp.bool_ else x


def _blocks(q: QTensor) -> tuple[int, ...]:
    return tuple(n // count for n, count in zip(q.codes.shape, q.scale.shape, strict=True))
