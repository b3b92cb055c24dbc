"""What the fine-tuning of the language model is made of."""

import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.training import finetuning

SIZE = finetuning.Size(tokens=4, held_out=2)


def bytes_of(text):
    return list(text.encode())


TOKENIZER = types.SimpleNamespace(encode=bytes_of)


def test_every_tenth_topic_is_held_out():
    texts = [bytes([65 + i]) * 20 for i in range(20)]
    data = finetuning.read_data(TOKENIZER, SIZE, texts)
    assert data.held_out.shape == (2, 5)
    assert set(data.held_out.ravel()) == {65 + 5, 65 + 15}
    assert set(data.trained) == set(range(65, 85)) - {70, 80}
    batch = data.batch(np.random.default_rng(0))
    assert batch.shape == (1, 5)


def test_short_topics_raise():
    with pytest.raises(ValueError, match=r"2 windows of 5 tokens; got 1\. Ask for fewer"):
        finetuning.read_data(TOKENIZER, SIZE, [b"abcdefg"] * 8)


def test_the_first_and_last_layers_are_stacks_of_their_own():
    params = {"layers": ({"w": jnp.arange(5)},), "norm": jnp.ones(2)}
    assert finetuning.split_layers(params, 0, 0) is params
    stacks = finetuning.split_layers(params, 1, 2)["layers"]
    assert [stack["w"].tolist() for stack in stacks] == [[0], [1, 2], [3, 4]]


def test_rows_that_a_file_holds_are_not_run_again():
    trainer: Any = types.SimpleNamespace(
        run=lambda row, seed: row, run_peer=lambda peer, seed: peer
    )
    before = [{"contender": "float32", "seed": 0}]
    asked = ["float32", "SWITCHBACK"]
    for seed, wanted in ((0, asked[1:]), (1, asked)):
        found = finetuning._results(trainer, seed, asked, before)
        assert [name for name, _ in found] == wanted
