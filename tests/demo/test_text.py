import re
import shutil
import sys

import numpy as np
import pytest

from jaxquant import demo

from .encoders import VOCABULARY

PAD, UNKNOWN, START, END = range(4)


def test_sentences_differ_and_have_the_stated_lengths():
    found = demo.documentation_sentences(600)
    assert len(set(found)) == len(found) == 600
    assert all(40 <= len(s) <= 140 for s in found)
    assert all(re.fullmatch(r"[A-Z][^.]*\.", s) for s in found)
    assert all(s == " ".join(s.split()) for s in found)


def test_sentences_are_the_same_each_time_and_spread_over_the_documentation():
    everything = demo.documentation_sentences(600)
    assert demo.documentation_sentences(600) == everything
    few = demo.documentation_sentences(7)
    assert (few[0], few[-1]) == (everything[0], everything[-1])
    assert demo.documentation_sentences(1) == everything[:1]
    assert demo.documentation_sentences(0) == []


@pytest.mark.parametrize("count", [-1, 1_000_000])
def test_more_sentences_than_exist_raise(count):
    text = rf"documentation has \d+ usable sentences; got count={count}. Pass a smaller count"
    with pytest.raises(ValueError, match=text):
        demo.documentation_sentences(count)


def test_all_sentences_can_be_requested():
    with pytest.raises(ValueError, match="usable") as error:
        demo.documentation_sentences(10**9)
    count = int(re.findall(r"has (\d+) usable", str(error.value))[0])
    assert count > 600
    assert len(set(demo.documentation_sentences(count))) == count


def ids_of(*words):
    return [VOCABULARY.index(w) for w in words]


def test_short_sentences_are_padded_and_long_ones_cut(tiny):
    texts = ["The cat sat", "the dog ran and the bird flew over it", "zebra"]
    tokens = demo.tokenize(texts, tiny[0], length=6, batch_size=3)
    wanted = [
        [START, *ids_of("the", "cat", "sat"), END, PAD],
        [START, *ids_of("the", "dog", "ran", "and"), END],
        [START, UNKNOWN, END, PAD, PAD, PAD],
    ]
    np.testing.assert_array_equal(tokens.ids, [wanted])
    np.testing.assert_array_equal(tokens.mask, [[[1] * n + [0] * (6 - n) for n in (5, 6, 3)]])
    assert tokens.count == 3
    assert tokens.ids.dtype == tokens.mask.dtype == np.int32


@pytest.mark.parametrize("count, batch_size, batches", [(5, 2, 3), (4, 2, 2), (1, 8, 1), (0, 4, 0)])
def test_the_last_batch_is_filled_with_empty_sentences(tiny, count, batch_size, batches):
    texts = ["cat " * (i + 1) for i in range(count)]
    tokens = demo.tokenize(texts, tiny[0], length=8, batch_size=batch_size)
    assert tokens.ids.shape == tokens.mask.shape == (batches, batch_size, 8)
    assert tokens.count == count
    lengths = tokens.mask.reshape(-1, 8).sum(1).tolist()
    assert lengths == [i + 3 for i in range(count)] + [2] * (batches * batch_size - count)
    assert len(texts) == count


def test_the_error_names_a_folder_without_a_tokenizer(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        demo.tokenize(["the cat"], tmp_path)
    shutil.copytree(tiny[0], tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer.json does not describe a tokenizer: .* Copy"):
        demo.tokenize(["the cat"], tmp_path / "copy")


def test_without_tokenizers_the_error_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"Text needs tokenizers: pip install 'jaxquant\[demo\]'"):
        demo.tokenize(["the cat"], tiny[0])
