"""Tokenizers of language models, from GGUF files and from folders of Hugging Face."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints import Checkpoint
from .text import read_tokenizer, tokenizers_package

_PREFIX = "tokenizer.ggml."
# `token_type` of tokens such as "<|im_end|>", which text is not split into.
_CONTROL = 3
# Llama 3's split of text into words.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Text to tokens and back.

    Attributes:
        tokenizer: of the package `tokenizers`.
        stops: ids that end a text.
        first: ids that start a text, if the tokenizer does not add them itself.
        template: Jinja template of a conversation; None if the model has none.
        names: what the template may use: `bos_token` and `eos_token`.
    """

    tokenizer: Any
    stops: frozenset[int]
    first: tuple[int, ...]
    template: str | None
    names: Mapping[str, str]

    def encode(self, text: str) -> list[int]:
        """The ids of a text to continue."""
        return [*self.first, *self.tokenizer.encode(text).ids]

    def encode_chat(self, message: str) -> list[int]:
        """The ids of a conversation that starts with a message and waits for the answer.

        Raises:
            ImportError: jinja2 is not installed.
            ValueError: the model has no template.
        """
        if self.template is None:
            raise ValueError(
                f"This model has no template for conversations; got the message {message[:40]!r}. "
                "Leave out --chat."
            )
        messages = [{"role": "user", "content": message}]
        template = _jinja().from_string(self.template)
        text = template.render(messages=messages, add_generation_prompt=True, **self.names)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def pieces(self, ids: Iterable[int]) -> Iterable[str]:
        """The text of the ids, piece by piece, up to the first of `stops`."""
        stream = tokenizers_package().decoders.DecodeStream(skip_special_tokens=True)
        for i in ids:
            if i in self.stops:
                return
            # Empty while a character is not complete.
            yield stream.step(self.tokenizer, i) or ""


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """The tokenizer that comes with a model.

    Raises:
        ImportError: `tokenizers` is not installed.
        FileNotFoundError: a folder has no tokenizer.json.
        ValueError: the tokenizer is malformed, or of a kind that is not supported.
    """
    if checkpoint.path.is_dir():
        return _from_folder(checkpoint.path)
    found = {
        k.removeprefix(_PREFIX): v for k, v in checkpoint.metadata.items() if k.startswith(_PREFIX)
    }
    return _from_gguf(checkpoint, found)


def _from_gguf(checkpoint: Checkpoint, found: Mapping[str, Any]) -> Vocabulary:
    kind, split = found.get("model"), found.get("pre", "default")
    if kind not in _MODELS or split not in _SPLITS:
        raise ValueError(
            f"{checkpoint.path}: tokenizers of {', '.join(_MODELS)} with words as in "
            f"{', '.join(_SPLITS)} are supported; got {kind!r} with {split!r}. Use the model's "
            "folder of Hugging Face, which has a tokenizer.json."
        )
    try:
        tokenizer = _MODELS[kind](found)
        tokens = found["tokens"]
        bos, eos = (found.get(f"{name}_token_id") for name in ("bos", "eos"))
        names = {n: tokens[i] for n, i in (("bos_token", bos), ("eos_token", eos)) if i is not None}
    except ImportError:
        raise
    except Exception as error:  # `tokenizers` raises no narrower one.
        raise ValueError(
            f"{checkpoint.path}: its tokenizer is malformed: {error!r}. Copy the file again."
        ) from error
    stops = {found.get(f"{name}_token_id") for name in ("eos", "eot", "eom")}
    return Vocabulary(
        tokenizer,
        stops=frozenset(i for i in stops if i is not None),
        first=(bos,) if found.get("add_bos_token") and bos is not None else (),
        template=checkpoint.metadata.get("tokenizer.chat_template"),
        names=names,
    )


def _byte_pairs(found: Mapping[str, Any]) -> Any:
    """Byte-pair encoding of bytes, as in GPT-2."""
    package = tokenizers_package()
    tokens, types = found["tokens"], found["token_type"]
    merges = [tuple(m.split(" ")) for m in found["merges"]]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = package.Tokenizer(package.models.BPE(ids, merges))
    tokenizer.pre_tokenizer = _SPLITS[found.get("pre", "default")](package)
    tokenizer.decoder = package.decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens(control)
    return tokenizer


def _gpt2_words(package: Any) -> Any:
    return package.pre_tokenizers.ByteLevel(add_prefix_space=False)


def _single_digits(package: Any) -> Any:
    digits = package.pre_tokenizers.Digits(individual_digits=True)
    return package.pre_tokenizers.Sequence([digits, _gpt2_words(package)])


def _llama3_words(package: Any) -> Any:
    words = package.pre_tokenizers.Split(package.Regex(_LLAMA3_WORDS), "isolated")
    as_bytes = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return package.pre_tokenizers.Sequence([words, as_bytes])


# By tokenizer.ggml.model, and by tokenizer.ggml.pre: files do not say how to split text into words.
_MODELS: dict[Any, Callable[[Mapping[str, Any]], Any]] = {"gpt2": _byte_pairs}
_SPLITS: dict[Any, Callable[[Any], Any]] = {
    "smollm": _single_digits,
    "gpt-2": _gpt2_words,
    "llama-bpe": _llama3_words,
    "llama3": _llama3_words,
}


def _from_folder(folder: Path) -> Vocabulary:
    config = _json(folder / "config.json") | _json(folder / "generation_config.json")
    options = _json(folder / "tokenizer_config.json")
    tokenizer = read_tokenizer(folder)
    stops = config.get("eos_token_id", [])
    template = folder / "chat_template.jinja"
    return Vocabulary(
        tokenizer,
        stops=frozenset(stops if isinstance(stops, Sequence) else [stops]),
        first=(),
        template=template.read_text() if template.exists() else options.get("chat_template"),
        names={name: _token(options.get(name)) for name in ("bos_token", "eos_token")},
    )


def _token(value: Any) -> str:
    """Tokens are strings, or objects that hold one."""
    return value.get("content", "") if isinstance(value, dict) else value or ""


def _json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Copy it again.") from error


def _jinja() -> Any:
    try:
        # An optional package, which type checkers may not find.
        import jinja2.sandbox  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"Conversations need jinja2: pip install 'jaxquant[demo]' ({error})."
        ) from error
    # Templates come with models, and run without access to anything but their arguments.
    return jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
