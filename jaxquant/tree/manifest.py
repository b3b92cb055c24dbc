"""Trees to JSON values and named NumPy arrays, and back.

A node is [kind, content]; the kinds are the keys of `_DECODERS`.
"""

import collections
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import (
    BlockRotation,
    Inputs,
    LowRank,
    QTensor,
    bits_of,
    config_from_json,
    config_to_json,
    pack_int2,
    pack_int4,
    static_from_json,
    static_to_json,
    unpack_int2,
    unpack_int4,
)
from .packed_codes import from_bits, pack, unpack, words_for
from .tensor_file import METADATA

# Dtypes that safetensors passes to NumPy unchanged. All others are stored as bytes.
_NATIVE = {f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (16, 32, 64)}
_NATIVE |= {"bool", "int8", "uint8", "bfloat16", "complex64"}
# Dtypes stored as bytes, besides those that JAX adds to NumPy's.
_KNOWN = _NATIVE | {"complex128"}
_PACKING = {4: (pack_int4, unpack_int4), 2: (pack_int2, unpack_int2)}


class Encoder:
    """Collects the arrays and the static parts of a tree while it writes the structure.

    Attributes:
        version: the oldest version of files that holds the tree. 2 if a QTensor has an offset or a
            permutation, 3 if one has a rotation, and 4 if its codes take fewer bits than in memory.
        store: (array, bits or None for those of its dtype) -> the form in which it is stored.
        arrays: what `store` returns, a NumPy array, per name.
        statics: JSON values of the static parts that nodes refer to, by their position: many
            QTensors share one.
    """

    def __init__(self, store: Callable[[Any, int | None], Any] | None = None) -> None:
        self.store: Callable[[Any, int | None], Any] = store or to_stored
        self.version: int = 1
        self.arrays: dict[str, Any] = {}
        self.statics: list[Any] = []

    def encode(self, tree: Any, path: str = "", bits: int | None = None) -> list[Any]:
        """The node of a tree, or of codes of so many bits."""
        if isinstance(tree, dict):
            return self._encode_dict({k: tree[k] for k in _keys(tree, path)}, path)
        if type(tree) in (list, tuple):
            items = [self.encode(v, _join(path, i)) for i, v in enumerate(tree)]
            return [type(tree).__name__, items]
        if isinstance(tree, QTensor):
            return self._encode_qtensor(tree, path)
        if isinstance(tree, LowRank):
            return self._encode_low_rank(tree, path)
        if tree is None or isinstance(tree, bool | int | float | str):
            return ["value", tree]
        is_form = self.store is stored_form and isinstance(tree, jax.ShapeDtypeStruct)
        if is_form or isinstance(tree, jax.Array | np.ndarray | np.generic):
            return self._encode_array(tree, path, bits)
        return self._encode_container(tree, path)

    def _encode_dict(self, items: dict[Any, Any], path: str) -> list[Any]:
        return ["dict", [[k, self.encode(v, _join(path, k))] for k, v in items.items()]]

    def _encode_qtensor(self, q: QTensor, path: str) -> list[Any]:
        inputs = q.inputs
        self.version = max(self.version, _version_for(q))
        bits = q.format.dense_bits if q.format.dense_bits < q.format.bits else None
        parts: dict[str, Any] = {"codes": self.encode(q.codes, _join(path, "codes"), bits)}
        fields = {k: getattr(q, k) for k in ("scale", "zero_point", "offset")}
        parts |= {k: self.encode(v, _join(path, k)) for k, v in fields.items() if v is not None}
        if inputs is not None:
            names = ("scale", "zero_point", "multiplier", "permutation")
            arrays = {k: getattr(inputs, k) for k in names}
            known: dict[str, Any] = {k: v for k, v in arrays.items() if v is not None}
            if inputs.rotation is not None:
                known["rotation"] = {
                    "signs": inputs.rotation.signs,
                    "block": inputs.rotation.block,
                }
            config = None if inputs.config is None else self._static(config_to_json(inputs.config))
            parts["inputs"] = [config, self.encode(known, _join(path, "inputs"))]
        return ["qtensor", [self._static(static_to_json(q)), parts]]

    def _encode_low_rank(self, x: LowRank, path: str) -> list[Any]:
        static = self._static({"alpha": x.alpha, "config": config_to_json(x.config)})
        fields = {"base": x.base, "a": x.a, "b": x.b}
        if x.magnitude is not None:
            fields["magnitude"] = x.magnitude
            self.version = max(self.version, 5)
        return [
            "low_rank",
            [static, {k: self.encode(v, _join(path, k)) for k, v in fields.items()}],
        ]

    def _static(self, value: Any) -> int:
        value = json.loads(json.dumps(value))
        if value not in self.statics:
            self.statics.append(value)
        return self.statics.index(value)

    def _encode_array(self, array: Any, path: str, bits: int | None) -> list[Any]:
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"{path}: a key array cannot be saved, got {array.dtype}. Save "
                "jax.random.key_data(key)."
            )
        # NumPy calls the dtypes that JAX adds "user-defined", 2.
        if array.dtype.name not in _KNOWN and array.dtype.isbuiltin != 2:
            raise ValueError(
                f"{path or 'The tree'}: an array of {array.dtype}, shape {array.shape}, cannot be "
                "saved. Convert it to a dtype that JAX knows."
            )
        name = path or "array"
        while name in self.arrays or name == METADATA:
            name += "'"
        try:
            self.arrays[name] = stored = self.store(array, bits)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if bits is not None:
            return ["array", [name, array.dtype.name, list(array.shape), bits]]
        is_plain = stored.dtype.name == array.dtype.name
        return ["array", [name] if is_plain else [name, array.dtype.name, list(array.shape)]]

    def _encode_container(self, tree: Any, path: str) -> list[Any]:
        """A node of another kind, as a dict of its children."""
        found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
        if len(found) == 1 and not found[0][0]:
            raise ValueError(
                f"{path or 'The tree'}: a leaf must be an array, a QTensor, a number, a string or "
                f"None; got {type(tree).__name__}."
            )
        children = {jax.tree_util.keystr(k, simple=True): v for k, v in found}
        return self._encode_dict(children, path)


class Decoder:
    """Builds a tree from nodes.

    Attributes:
        statics: as collected by the encoder.
        read: returns the stored array with a name.
        restore: (stored array, dtype or None for its own, shape or None) -> array; a fourth
            argument is the number of bits of codes that are narrower than their dtype.
    """

    def __init__(
        self,
        statics: list[Any],
        read: Callable[[str], np.ndarray],
        restore: Callable[..., Any] | None = None,
    ) -> None:
        self.statics = statics
        self.read = read
        self.restore: Callable[..., Any] = restore or _from_stored

    def decode(self, node: list[Any]) -> Any:
        """The tree of a node."""
        kind, content = node
        return _DECODERS[kind](self, content)

    def _dict(self, content: Any) -> dict[Any, Any]:
        return {k: self.decode(v) for k, v in content}

    def _list(self, content: Any) -> list[Any]:
        return [self.decode(v) for v in content]

    def _tuple(self, content: Any) -> tuple[Any, ...]:
        return tuple(self._list(content))

    def _value(self, content: Any) -> Any:
        if not (content is None or isinstance(content, bool | int | float | str)):
            raise TypeError(f"a value must be a number, a string or None, got {content!r}")
        return content

    def _array(self, content: Any) -> jax.Array | np.ndarray:
        name, *original = content
        stored = self.read(name)
        if not original:
            return self.restore(stored, None, None)
        dtype, shape, *bits = original
        return self.restore(stored, jnp.dtype(dtype), tuple(shape), *bits)

    def _qtensor(self, content: Any) -> QTensor:
        static, parts = content
        inputs = parts.pop("inputs", None)
        arrays = {k: self.decode(v) for k, v in parts.items()}
        if inputs is not None:
            config, node = inputs
            config = None if config is None else config_from_json(self.statics[config])
            fields = self.decode(node)
            if "rotation" in fields:
                fields["rotation"] = BlockRotation(**fields["rotation"])
            arrays["inputs"] = Inputs(config, **fields)
        return QTensor(**arrays, **static_from_json(self.statics[static]))

    def _low_rank(self, content: Any) -> LowRank:
        static, parts = content
        row = self.statics[static]
        # Its axes, which were written once, are those of the base.
        config = config_from_json({**row["config"], "axis": 0})
        arrays = {k: self.decode(v) for k, v in parts.items()}
        return LowRank(**arrays, alpha=row["alpha"], config=config)


_DECODERS = {
    "dict": Decoder._dict,
    "list": Decoder._list,
    "tuple": Decoder._tuple,
    "value": Decoder._value,
    "array": Decoder._array,
    "qtensor": Decoder._qtensor,
    "low_rank": Decoder._low_rank,
}


def _version_for(q: QTensor) -> int:
    """The oldest version of files that holds a QTensor."""
    if q.format.dense_bits < q.format.bits:
        return 4
    if q.inputs is not None and q.inputs.rotation is not None:
        return 3
    has_permutation = q.inputs is not None and q.inputs.permutation is not None
    return 2 if q.offset is not None or has_permutation else 1


def _keys(tree: dict[Any, Any], path: str) -> list[Any]:
    """Keys of a dict, sorted. JAX also ignores the insertion order of dicts."""
    for key in tree:
        if not isinstance(key, str | int):
            raise ValueError(f"{path or 'The tree'}: keys must be str or int; got {key!r}.")
    if isinstance(tree, collections.OrderedDict):
        return list(tree)
    return sorted(tree, key=lambda key: (isinstance(key, str), key))


def _join(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


def stored_form(array: Any, bits: int | None = None) -> jax.ShapeDtypeStruct:
    """Shape and dtype of what `to_stored` returns for an array, or for its shape and dtype."""
    if bits is not None:
        count = words_for(math.prod(array.shape), bits, 8)
        return jax.ShapeDtypeStruct((count,), np.dtype(np.uint8))
    if array.dtype.name in _NATIVE:
        return jax.ShapeDtypeStruct(array.shape, array.dtype)
    bits = bits_of(array.dtype)
    size = math.prod(array.shape)
    count = -(-size * bits // 8) if bits in _PACKING else size * array.dtype.itemsize
    return jax.ShapeDtypeStruct((count,), np.dtype(np.uint8))


def to_stored(array: Any, bits: int | None = None) -> np.ndarray:
    """The bytes of arrays whose dtype safetensors lacks, with sub-byte codes packed.

    Raises:
        ValueError: a code does not fit in `bits`.
    """
    if bits is not None:
        codes = np.asarray(array, np.int16).reshape(-1)
        least = -(2 ** (bits - 1)) if jnp.issubdtype(array.dtype, jnp.signedinteger) else 0
        if codes.size and not least <= codes.min() <= codes.max() < least + 2**bits:
            raise ValueError(
                f"codes must be from {least} to {least + 2**bits - 1} in a format of {bits} bits; "
                f"got {codes.min()} to {codes.max()}. Quantize it again, or choose another format."
            )
        return pack((codes & (2**bits - 1)).astype(np.uint8), bits, np.uint8)
    if array.dtype.name in _NATIVE:
        # safetensors writes memory in its current layout.
        return np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    bits = bits_of(array.dtype)
    if bits not in _PACKING:
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    codes = jnp.asarray(array).reshape(-1)
    codes = jax.lax.bitcast_convert_type(codes, jnp.dtype(f"uint{bits}"))
    return np.asarray(_PACKING[bits][0](codes))


def _from_stored(
    stored: np.ndarray,
    dtype: np.dtype | None,
    shape: tuple[int, ...] | None,
    narrow: int | None = None,
) -> jax.Array | np.ndarray:
    """Undoes `to_stored`. Arrays that are stored as they are have neither dtype nor shape."""
    if dtype is None or shape is None:
        return _on_device(stored)
    if narrow is not None:
        check_size(stored.nbytes, dtype, shape, narrow)
        codes = unpack(stored.view(np.uint8), narrow)[: math.prod(shape)]
        return jnp.asarray(from_bits(codes, narrow, dtype).reshape(shape))
    bits = bits_of(dtype)
    if bits not in _PACKING:
        return _on_device(stored.view(dtype).reshape(shape))
    return _unpacked(stored, dtype, shape)


def check_size(
    nbytes: int, dtype: np.dtype, shape: tuple[int, ...], bits: int | None = None
) -> None:
    """Raises ValueError if an array that is stored as bytes does not take as many of them.

    Args:
        nbytes: of what is stored.
        dtype, shape: of the array.
        bits: of codes that are narrower than their dtype.
    """
    if bits is not None and not (type(bits) is int and 0 < bits < bits_of(dtype) <= 8):
        raise ValueError(f"codes of {dtype} cannot take {bits!r} bits")
    if words_for(math.prod(shape), bits or bits_of(dtype), 8) != nbytes:
        raise ValueError(f"{dtype} of shape {shape} does not take {nbytes} bytes")


# In one program: separate steps took 2.5 times as long to read 4-bit codes.
@partial(jax.jit, static_argnames=("dtype", "shape"))
def _unpacked(stored: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> jax.Array:
    bits = bits_of(dtype)
    codes = _PACKING[bits][1](stored, math.prod(shape))
    codes = codes.astype(jnp.dtype(f"uint{bits}"))
    return jax.lax.bitcast_convert_type(codes, dtype).reshape(shape)


def _on_device(array: np.ndarray) -> jax.Array | np.ndarray:
    """Puts x on the default device, unless JAX would truncate it from 64 bits to 32."""
    is_whole = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    return jnp.asarray(array) if is_whole else array
