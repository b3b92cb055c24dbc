"""One part of an update: decodes what it needs of a quantized state, and encodes the results."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core import AbsMax, ArrayConfig, QTensor, Seed
from ..jaxprs import ElementwisePart, is_sharded, on_one_cpu, varying_axes
from ..kernels import cpu
from .blockwise import Blockwise, quantize_blocks
from .state_blocks import layout_of
from .state_windows import windows_of

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
    """The results in one window after another. Codes and scales are overwritten."""
    part = plan.part
    stored = {at: arrays[at].q for at in plan.stored}
    windows = windows_of(part.shape, [_blocks(q) for q in stored.values()])
    encoded = {found[0]: at for at, found in plan.stored.items() if found is not None}

    def decode(at, in_place, starts):
        q = stored[at]
        codes, scale = in_place.get(at, (q.codes, q.scale))
        # XLA fuses this with the update, but slices 4-bit codes one by one. A single window would
        # not wait for `after`.
        if q.format.bits == 8 and windows.count > 1:
            whole = dataclasses.replace(q, codes=codes, scale=scale)
            return _window_of(whole, starts, windows.shape).dequantize()
        return cpu.decode_powers(codes, scale, q.format, _blocks(q), windows.shape, starts, after)

    def encode(place, values, in_place, starts):
        q, seed = stored[encoded[place]], seeds.get(place)
        words = None if seed is None else seed.words
        within = in_place[encoded[place]]
        return cpu.encode_powers(values, q.format, _blocks(q), words, within, starts)

    def window(number, carried):
        in_place, others = carried
        starts = windows.starts(number)
        values = [
            decode(at, in_place, starts)
            if at in stored
            else lax.dynamic_slice(x, starts, windows.shape)
            for at, x in enumerate(arrays)
        ]
        results = dict(zip(part.places, part.compute(values, scalars), strict=True))
        found = {at: encode(p, results[p], in_place, starts) for p, at in encoded.items()}
        written = {p: lax.dynamic_update_slice(x, results[p], starts) for p, x in others.items()}
        return found, written

    in_place = {at: (stored[at].codes, stored[at].scale) for at in encoded.values()}
    # XLA allocates them once `after` is computed. Zeros would be there from the start.
    others = {
        place: cpu.empty(part.shape, dtype, after)
        for place, dtype in zip(part.places, part.dtypes, strict=True)
        if place not in encoded
    }
    in_place, results = lax.fori_loop(0, windows.count, window, (in_place, others))
    for place, at in encoded.items():
        codes, scale = in_place[at]
        results[place] = Blockwise(dataclasses.replace(stored[at], codes=codes, scale=scale))
    return results


def _window_of(q: QTensor, starts: Sequence[Any], shape: tuple[int, ...]) -> QTensor:
    """A part of an array that consists of whole blocks."""
    blocks = _blocks(q)
    firsts = [start // block for start, block in zip(starts, blocks, strict=True)]
    counts = [n // block for n, block in zip(shape, blocks, strict=True)]
    codes = lax.dynamic_slice(q.codes, starts, shape)
    scale: Any = q.scale
    return dataclasses.replace(q, codes=codes, scale=lax.dynamic_slice(scale, firsts, counts))


def _blocks(q: QTensor) -> tuple[int, ...]:
    return tuple(n // count for n, count in zip(q.codes.shape, q.scale.shape, strict=True))
