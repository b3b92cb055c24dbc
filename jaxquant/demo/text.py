"""English sentences from Python's own documentation, and their tokens."""

import dataclasses
import pydoc_data.topics
import re
from pathlib import Path
from typing import Any

import numpy as np

# From a capital at the start, or after a full stop, to the next full stop.
_SENTENCE = re.compile(r"(?:^|(?<=\. ))([A-Z][^.]*\.)(?= |$)")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Padded token ids of sentences, in batches of one length.

    Attributes:
        ids: (batches, B, T) token ids.
        mask: (batches, B, T), 1 for real tokens.
        count: number of sentences; the rows after them are padding.
    """

    ids: np.ndarray
    mask: np.ndarray
    count: int


def documentation_sentences(count: int) -> list[str]:
    """Different sentences of 40 to 140 characters, spread evenly over `pydoc_data.topics`.

    Raises:
        ValueError: the documentation has fewer, or count is negative.
    """
    found = {}
    for topic in pydoc_data.topics.topics.values():
        for paragraph in re.split(r"\n\s*\n", topic):
            # Deeper indentation is code, and tables and headings do not contain full stops.
            if not paragraph.startswith(("      ", ">>>")):
                text = " ".join(paragraph.split())
                found.update(dict.fromkeys(_SENTENCE.findall(text)))
    sentences = [s for s in found if 40 <= len(s) <= 140 and re.search(r"[a-z]{3} [a-z]", s)]
    if not 0 <= count <= len(sentences):
        raise ValueError(
            f"Python's documentation has {len(sentences)} usable sentences; got count={count}. "
            "Pass a smaller count."
        )
    places = np.linspace(0, len(sentences) - 1, count).astype(int)
    return [sentences[i] for i in places]


def tokenize(
    sentences: list[str], folder: Path, *, length: int = 32, batch_size: int = 32
) -> Tokens:
    """Splits sentences into tokens with the tokenizer of an encoder's folder.

    Args:
        sentences: texts.
        folder: holds `tokenizer.json`.
        length: tokens per sentence; longer ones are cut, shorter ones padded.
        batch_size: sentences per batch; the last one is padded with empty sentences.

    Raises:
        ImportError: `tokenizers` is not installed.
        FileNotFoundError: `tokenizer.json` is missing in the folder.
        ValueError: that file does not describe a tokenizer.
    """
    tokenizer = read_tokenizer(folder)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    batches = -(-len(sentences) // batch_size)
    padded = sentences + [""] * (batches * batch_size - len(sentences))
    encodings = tokenizer.encode_batch(padded)
    shape = (batches, batch_size, length)
    ids = np.array([e.ids for e in encodings], np.int32).reshape(shape)
    mask = np.array([e.attention_mask for e in encodings], np.int32).reshape(shape)
    return Tokens(ids, mask, len(sentences))


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer that `tokenizer.json` in a folder describes; errors as for `tokenize`."""
    package = tokenizers_package()
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    try:
        return package.Tokenizer.from_str(text)
    except Exception as error:  # It raises no narrower one.
        raise ValueError(
            f"{path} does not describe a tokenizer: {error}. Copy it again."
        ) from error


def tokenizers_package() -> Any:
    """The package `tokenizers`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        # An optional package.
        import tokenizers
    except ImportError as error:
        raise ImportError(
            f"Text needs tokenizers: pip install 'jaxquant[demo]' ({error})."
        ) from error
    return tokenizers
