"""Matrix multiplications by ONNX Runtime, as graphs of its quantized operators."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from .products import Contender

_GROUP = 128
# A graph: nodes, and arrays by name.
Graph = tuple[list[Any], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Session:
    """A model that ONNX Runtime has loaded.

    Attributes:
        model: the model's bytes, to load it again.
        session: of ONNX Runtime.
        size: bytes of the weights and their scales.
    """

    model: bytes
    session: Any
    size: int


def _dynamic_int8(onnx: Any, w: np.ndarray) -> Graph:
    """Dynamic uint8 activations by int8 weights with one scale per column."""
    node = onnx.helper.make_node
    scale = np.abs(w).max(0) / 127
    codes = np.clip(np.round(w / scale), -127, 127).astype(np.int8)
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"]),
        node("MatMulInteger", ["codes", "weights", "zero"], ["sums"]),
        node("Cast", ["sums"], ["floats"], to=onnx.TensorProto.FLOAT),
        node("Mul", ["scale", "scales"], ["steps"]),
        node("Mul", ["floats", "steps"], ["y"]),
    ]
    return nodes, {"weights": codes, "scales": scale}


def _int4(onnx: Any, w: np.ndarray) -> Graph:
    """4-bit weights in groups of 128; the kernel quantizes activations to 8 bits.

    Raises:
        ValueError: the groups do not divide the contracted axis.
    """
    length, columns = w.shape
    if length % _GROUP:
        raise ValueError(f"Groups of {_GROUP} must divide the contracted axis; got {length}.")
    groups = w.T.reshape(columns, -1, _GROUP)
    scale = np.abs(groups).max(-1) / 7
    codes = np.clip(np.round(groups / scale[..., None]), -8, 7) + 8
    codes = codes.astype(np.uint8)
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)
    sizes = {"K": length, "N": columns, "bits": 4, "block_size": _GROUP, "accuracy_level": 4}
    inputs = ["x", "weights", "scales"]
    node = onnx.helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", **sizes)
    return [node], {"weights": packed, "scales": scale.reshape(-1)}


BUILDERS = {"w8a8": _dynamic_int8, "w4a8 g128": _int4}


def of_onnx(
    name: str, build: Callable[[Any, np.ndarray], Graph], onnx: Any, runtime: Any
) -> Contender:
    """One of these graphs."""

    def prepare(w):
        nodes, arrays = build(onnx, np.asarray(w))
        model = _model(onnx, nodes, arrays, w.shape)
        return Session(model, _load(runtime, model), sum(a.nbytes for a in arrays.values()))

    return Contender(
        name,
        False,
        prepare,
        lambda x, session: session.session.run(None, {"x": x})[0],
        "float32",
        compile=lambda run: run,
        place=np.asarray,
        copy=lambda s: dataclasses.replace(s, session=_load(runtime, s.model)),
        size=lambda s: s.size,
    )


def _model(onnx, nodes, arrays, shape):
    tensors = [onnx.numpy_helper.from_array(a, name) for name, a in arrays.items()]
    ends = [
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, length])]
        for name, length in zip("xy", shape, strict=True)
    ]
    graph = onnx.helper.make_graph(nodes, "product", *ends, tensors)
    opsets = [("", 21), ("com.microsoft", 1)]
    opsets = [onnx.helper.make_opsetid(*opset) for opset in opsets]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _load(runtime, model):
    options = runtime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    # Otherwise its threads keep spinning during the turn of the next contender.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
