"""Tokenizers of language models, from GGUF files and from folders of Hugging Face."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints import Checkpoint
from .text import read_tokenizer, tokenizers_package

_PREFIX = "tokenizer.ggml."
# `token_type` of tokens such as "<|im_end|>", which are found in text before it is split.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
# What SentencePiece writes for a space.
_SPACE = "\u2581"
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
            ValueError: the model has no template, or one that fails.
        """
        if self.template is None:
            raise ValueError(
                f"This model has no template for conversations; got the message {message[:40]!r}. "
                "Leave out --chat."
            )
        messages = [{"role": "user", "content": message}]
        environment = _jinja()
        try:
            template = environment.from_string(self.template)
            text = template.render(messages=messages, add_generation_prompt=True, **self.names)
        except Exception as error:  # Templates are programs, and raise anything.
            raise ValueError(
                f"The model's template for conversations failed: {error!r}; it starts with "
                f"{str(self.template)[:40]!r}. Leave out --chat."
            ) from error
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
    # Lists, because values of metadata may not be hashable.
    splits = _MODELS[kind] if kind in list(_MODELS) else {}
    if split not in list(splits):
        kinds = "; ".join(f"{k} with words as in {', '.join(v)}" for k, v in _MODELS.items())
        raise ValueError(
            f"{checkpoint.path}: these tokenizers are supported: {kinds}; got {kind!r} with "
            f"{split!r}. Use the model's folder of Hugging Face, which has a tokenizer.json."
        )
    try:
        tokenizer = splits[split].build(found, splits[split])
        tokens = found["tokens"]
        bos, eos = (found.get(f"{name}_token_id") for name in ("bos", "eos"))
        names = {n: tokens[i] for n, i in (("bos_token", bos), ("eos_token", eos)) if i is not None}
        stops = {found.get(f"{name}_token_id") for name in ("eos", "eot", "eom")}
    except ImportError:
        raise
    except Exception as error:  # `tokenizers` raises no narrower one.
        raise ValueError(
            f"{checkpoint.path}: its tokenizer is malformed: {error!r}. Copy the file again."
        ) from error
    adds_bos = found.get("add_bos_token", splits[split].adds_bos)
    return Vocabulary(
        tokenizer,
        stops=frozenset(i for i in stops if i is not None),
        first=(bos,) if adds_bos and bos is not None else (),
        template=checkpoint.metadata.get("tokenizer.chat_template"),
        names=names,
    )


class _Split(NamedTuple):
    """How text is split into words, and what files leave out that goes with it.

    Attributes:
        build: makes the tokenizer from the metadata and this.
        words: makes the splitter from the package `tokenizers`; None to leave text whole.
        ignores_merges: whether a word that is a token becomes this token, whatever the merges.
        adds_bos: whether texts start with the token `bos` unless the file says otherwise.
    """

    build: Callable[[Mapping[str, Any], Any], Any]
    words: Callable[[Any], Any] | None = None
    ignores_merges: bool = False
    adds_bos: bool = False


def _byte_pairs(found: Mapping[str, Any], split: _Split) -> Any:
    """Byte-pair encoding of bytes, as in GPT-2."""
    package = tokenizers_package()
    tokens, types = found["tokens"], found["token_type"]
    merges = [tuple(m.split(" ")) for m in found["merges"]]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = package.Tokenizer(
        package.models.BPE(ids, merges, ignore_merges=split.ignores_merges)
    )
    tokenizer.pre_tokenizer = split.words and split.words(package)
    tokenizer.decoder = package.decoders.ByteLevel()
    _add_whole_tokens(tokenizer, tokens, types)
    return tokenizer


def _sentencepiece(found: Mapping[str, Any], split: _Split) -> Any:
    """Byte-pair encoding of characters as in SentencePiece, with bytes for unknown ones.

    Of all neighbours that make up a token, those of the highest score are joined first. Among equal
    scores, which files have for few tokens, the order may differ from SentencePiece's.
    """
    package = tokenizers_package()
    tokens, types = found["tokens"], found["token_type"]
    ids = {token: i for i, token in enumerate(tokens)}
    rows = zip(tokens, found["scores"], types, strict=True)
    scores = {t: score for t, score, kind in rows if kind in (_NORMAL, _USER_DEFINED)}
    unknown = tokens[found.get("unknown_token_id", 0)]
    tokenizer = package.Tokenizer(
        package.models.BPE(
            ids, _merges(scores), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    escape = package.normalizers.Replace(" ", _SPACE)
    if found.get("add_space_prefix", True):
        escape = package.normalizers.Sequence([package.normalizers.Prepend(" "), escape])
    tokenizer.normalizer = escape
    decoders = package.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _add_whole_tokens(tokenizer, tokens, types)
    return tokenizer


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Pairs of tokens that make up another one, in the order in which they are joined."""
    found = [
        (-score, -i, token[:i], token[i:])
        for token, score in scores.items()
        for i in range(1, len(token))
        if token[:i] in scores and token[i:] in scores
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _add_whole_tokens(tokenizer: Any, tokens: list[str], types: list[int]) -> None:
    """Tokens that are found in text before it is split."""
    kinds = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens([t for t, kind in kinds if kind == _CONTROL])
    added = tokenizers_package().AddedToken
    tokenizer.add_tokens([added(t, normalized=False) for t, kind in kinds if kind == _USER_DEFINED])


def _gpt2_words(package: Any) -> Any:
    return package.pre_tokenizers.ByteLevel(add_prefix_space=False)


def _single_digits(package: Any) -> Any:
    digits = package.pre_tokenizers.Digits(individual_digits=True)
    return package.pre_tokenizers.Sequence([digits, _gpt2_words(package)])


def _llama3_words(package: Any) -> Any:
    words = package.pre_tokenizers.Split(package.Regex(_LLAMA3_WORDS), "isolated")
    as_bytes = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return package.pre_tokenizers.Sequence([words, as_bytes])


_LLAMA3 = _Split(_byte_pairs, _llama3_words, ignores_merges=True, adds_bos=True)
# By tokenizer.ggml.model, and by tokenizer.ggml.pre: files do not say how to split text into words.
_MODELS: dict[str, dict[str, _Split]] = {
    "gpt2": {
        "smollm": _Split(_byte_pairs, _single_digits),
        "gpt-2": _Split(_byte_pairs, _gpt2_words),
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
    },
    "llama": {"default": _Split(_sentencepiece, adds_bos=True)},
}


def _from_folder(folder: Path) -> Vocabulary:
    config = _json(folder / "config.json") | _json(folder / "generation_config.json")
    options = _json(folder / "tokenizer_config.json")
    tokenizer = read_tokenizer(folder)
    stops = config.get("eos_token_id")
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    if not all(isinstance(i, int) for i in stops):
        raise ValueError(
            f"{folder}: eos_token_id must be an id, or a list of ids; got {stops!r}. Copy its "
            "config.json and generation_config.json again."
        )
    template = folder / "chat_template.jinja"
    return Vocabulary(
        tokenizer,
        stops=frozenset(stops),
        first=(),
        template=template.read_text(encoding="utf-8")
        if template.exists()
        else options.get("chat_template"),
        names={name: _token(options.get(name)) for name in ("bos_token", "eos_token")},
    )


def _token(value: Any) -> str:
    """Tokens are strings, or objects that hold one."""
    return value.get("content", "") if isinstance(value, dict) else value or ""


def _json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Copy it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object; got {str(found)[:40]!r}. Copy it again.")
    return found


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
