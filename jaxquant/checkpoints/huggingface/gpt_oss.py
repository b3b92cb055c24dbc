"""The experts of gpt-oss in MXFP4: blocks of 16 bytes and their exponents."""

from ...core import MXFP4
from ..bits import unpacked
from ..stored import Stored
from .derived import joined_axes
from .fields import Fields
from .module import Module, Pool, as_e8m0, as_float4

_BLOCKS, _SCALES = "_blocks", "_scales"


def read(pool: Pool, fields: Fields) -> list[Stored]:
    """The weights of quant_method "mxfp4", with the shape (E, K, N) of the model's parameters.

    Columns of gate_up_proj alternate between gate and up, as in the model.
    """
    return [
        _read_module(Module(pool, name.removesuffix(_BLOCKS)))
        for name in pool.folder.tensors
        if name.endswith(_BLOCKS)
    ]


def _read_module(module: Module) -> Stored:
    blocks = module.need(_BLOCKS).check(("uint8",))
    scales = module.need(_SCALES)
    if len(blocks.shape) < 3 or blocks.shape[-1] != 16 or not blocks.source.size:
        raise blocks.invalid("uint8 of shape (experts, N, K / 32, 16)")
    if scales.shape != blocks.shape[:-1]:
        raise scales.invalid(f"of shape {blocks.shape[:-1]}, one for each block of 16 bytes")
    words = joined_axes(blocks.source, len(blocks.shape) - 2)
    codes = as_float4(unpacked(words, 4, 2 * words.shape[-1], -1))
    scale = as_e8m0(scales)
    return module.stored("mxfp4", MXFP4, suffix="", order=(-1, -2), codes=codes, scale=scale)
