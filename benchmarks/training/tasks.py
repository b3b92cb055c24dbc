"""Tasks: predicting the next byte of Python's documentation, and classifying digits."""

import dataclasses
import math
import pathlib
import pydoc_data.topics
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq

from .model import BytesConfig, Product, next_byte_loss, random_params

# One text in ten is held out.
APART = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A task to train on.

    Attributes:
        name: as printed.
        init: random key -> parameters.
        loss: (parameters, batch, matrix multiplication by a kernel) -> mean loss, in nats.
        batch: random generator -> a batch to train on.
        held_out: batches of equal size that are never trained on.
        kernels: pattern of the leaves that are quantized.
    """

    name: str
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any, Product], jax.Array]
    batch: Callable[[np.random.Generator], Any]
    held_out: list[Any]
    kernels: str

    def rules(self, scheme: jq.Scheme) -> jq.Rule:
        """The scheme for the kernels; other leaves stay in float."""
        return jq.Rule(self.kernels, scheme)


def documentation() -> list[bytes]:
    """The topics of Python's documentation, by name."""
    return [text.encode() for _, text in sorted(pydoc_data.topics.topics.items())]


def source() -> list[bytes]:
    """The source files of this library, by name."""
    folder = pathlib.Path(jq.__file__).parent
    return [path.read_bytes() for path in sorted(folder.rglob("*.py"))]


def text_task(
    name: str, texts: Iterable[bytes], config: BytesConfig, batch: int = 8, windows: int = 320
) -> Task:
    """Predicting the next byte of texts, a tenth of which is held out.

    Args:
        name: as printed.
        texts: each is trained on as a whole, or held out as a whole.
        config: sizes of the transformer.
        batch: windows per step, at random places.
        windows: of the held-out texts, one after another, at most.

    Raises:
        ValueError: the texts are too short for a batch of them to be held out.
    """
    texts, first = list(texts), APART // 2
    size = config.length + 1
    trained = _joined(text for i, text in enumerate(texts) if i % APART != first)
    held_out = _joined(texts[first::APART])
    held_out = held_out[: len(held_out) // size * size].reshape(-1, size)[:windows]
    count = len(held_out) // batch
    if count == 0 or len(trained) < size:
        raise ValueError(
            f"texts must hold {batch} windows of {size} bytes in every {APART}th text from number "
            f"{first} on; got {len(held_out)} windows in {len(texts)} texts. Give more text."
        )

    def draw(rng):
        starts = rng.integers(0, len(trained) - size + 1, batch)
        return jnp.asarray(trained[starts[:, None] + np.arange(size)])

    def loss(params, batch, product):
        return next_byte_loss(params, config, batch, product)

    return Task(
        name,
        lambda key: random_params(config, key),
        loss,
        draw,
        [jnp.asarray(b) for b in np.split(held_out[: count * batch], count)],
        "layers/*/kernel",
    )


def _joined(texts):
    return np.frombuffer(b"\n\n".join(texts), np.uint8)


def digits_task(
    images: np.ndarray, labels: np.ndarray, widths: tuple[int, ...] = (128, 128), batch: int = 64
) -> Task:
    """Classifying digits with a perceptron; half of them are held out.

    Args:
        images: (n, pixels) floats.
        labels: (n,) integers.
        widths: of the hidden layers.
        batch: images per step.
    """
    images = (images / max(images.max(), 1)).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    trained, held_out = np.array_split(order, 2)
    sizes = (images.shape[1], *widths, int(labels.max()) + 1)

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        return [
            {
                "kernel": jax.random.normal(k, (n, m), jnp.float32) * math.sqrt(2 / n),
                "bias": jnp.zeros(m),
            }
            for k, n, m in zip(keys, sizes, sizes[1:], strict=False)
        ]

    def loss(params, batch, product):
        x, wanted = batch
        for i, layer in enumerate(params):
            x = product(x if i == 0 else jax.nn.relu(x), layer["kernel"]) + layer["bias"][None]
        found = jax.nn.log_softmax(x)
        return -jnp.mean(jnp.take_along_axis(found, wanted[:, None], -1))

    def draw(rng):
        chosen = rng.choice(trained, batch)
        return jnp.asarray(images[chosen]), jnp.asarray(labels[chosen])

    all_of = jnp.asarray(images[held_out]), jnp.asarray(labels[held_out])
    return Task("digits", init, loss, draw, [all_of], "*/kernel")


def installed_digits() -> Task | None:
    """scikit-learn's digits, or None if it is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return None
    images, labels = load_digits(return_X_y=True)
    return digits_task(np.asarray(images), np.asarray(labels))
