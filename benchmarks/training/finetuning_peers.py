"""Other libraries on the same model: their optimizers, and their quantized products."""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.demo import llama

# Fields of Qwix's rules for training. Without a type for gradients, products are quantized in the
# forward pass only.
_INT8 = {"weight_qtype": "int8", "act_qtype": "int8"}
_FP8 = {"weight_qtype": "float8_e4m3fn", "act_qtype": "float8_e4m3fn"}
QWIX: Mapping[str, Mapping[str, str]] = {
    "Qwix int8": {**_INT8, "bwd_qtype": "int8"},
    "Qwix fp8": {**_FP8, "bwd_qtype": "float8_e5m2"},
    "Qwix QAT int8": _INT8,
}


def with_qwix(fn: Callable[..., Any], fields: Mapping[str, str]) -> Callable[..., Any]:
    """The function with the products of kernels computed by Qwix; all others stay as they are."""
    qwix: Any = importlib.import_module("qwix")
    linen: Any = importlib.import_module("flax.linen")
    kernels = "btk,nk->btn"

    class Product(linen.Module):
        def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
            return jnp.einsum(kernels, x, kernel)

    rule = qwix.QtRule(module_path=".*", **fields)
    product = qwix.quantize_model(Product(), qwix.QtProvider([rule]))
    einsum = llama.einsum

    def by_qwix(subscripts, *operands, **options):
        if subscripts == kernels:
            return product.apply({}, *operands)
        return einsum(subscripts, *operands, **options)

    def call(*args):
        with mock.patch.object(llama, "einsum", by_qwix):
            return fn(*args)

    return call


@dataclasses.dataclass(frozen=True)
class Peer:
    """An optimizer of another library.

    Attributes:
        name: of the library and the optimizer.
        module: which must be installed.
        build: (parameters, weight decay) -> object with `step` and `state_bytes`.
    """

    name: str
    module: str
    build: Callable[[Any, float], Any]


class TorchOptimizer:
    """An optimizer of PyTorch over copies of a tree of JAX arrays."""

    def __init__(self, module: str, name: str, params: Any, decay: float):
        torch: Any = importlib.import_module("torch")
        leaves, self._structure = jax.tree.flatten(params)
        self._torch = torch
        self._params = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in leaves]
        make = getattr(importlib.import_module(module), name)
        self._optimizer = make(self._params, lr=0.0, weight_decay=decay)

    def step(self, gradients: Any, rate: float) -> Any:
        """The parameters after a step with this rate."""
        self.set_gradients(gradients)
        self.update(rate)
        leaves = [jnp.asarray(p.detach().numpy().copy()) for p in self._params]
        return jax.tree.unflatten(self._structure, leaves)

    def set_gradients(self, gradients: Any) -> None:
        """Copies gradients, for `update`."""
        for param, gradient in zip(self._params, jax.tree.leaves(gradients), strict=True):
            param.grad = self._torch.from_numpy(np.array(gradient))

    def update(self, rate: float) -> None:
        """A step with the gradients that are set."""
        for group in self._optimizer.param_groups:
            # torchao compiles its step for a tensor.
            is_tensor = isinstance(group["lr"], self._torch.Tensor)
            group["lr"] = self._torch.tensor(rate) if is_tensor else rate
        self._optimizer.step()

    def state_bytes(self) -> int:
        """Bytes of the averages."""
        states = self._optimizer.state.values()
        return sum(_bytes(x) for state in states for x in state.values())


def _bytes(x: Any) -> int:
    """Of a tensor; those of torchao hold codes and scales."""
    names = [name for name in ("codes", "scale", "qmap") if hasattr(x, name)]
    parts = [getattr(x, name) for name in names] or [x]
    return sum(p.numel() * p.element_size() for p in parts if hasattr(p, "numel"))


def _torch_peer(name: str, module: str, optimizer: str) -> Peer:
    def build(params, decay):
        return TorchOptimizer(module, optimizer, params, decay)

    return Peer(name, module.partition(".")[0], build)


PEERS = (
    _torch_peer("PyTorch AdamW", "torch.optim", "AdamW"),
    _torch_peer("torchao AdamW8bit", "torchao.optim", "AdamW8bit"),
    _torch_peer("torchao AdamW4bit", "torchao.optim", "AdamW4bit"),
)


def installed() -> Iterator[Peer]:
    """The peers whose library is installed."""
    for peer in PEERS:
        if importlib.util.find_spec(peer.module):
            yield peer
