"""Tokenizers that come with language models."""

import itertools
import json

import hypothesis
import hypothesis.strategies as st
import pytest

from jaxquant import checkpoints, demo

from . import llamas
from .llamas import gguf_files

STRING, ARRAY, UINT32, BOOL = gguf_files.STRING, 9, gguf_files.UINT32, gguf_files.BOOL
TEXT = "In the 1212 inns, the end."


@pytest.fixture(scope="module")
def arrays():
    return llamas.random_arrays()


@pytest.fixture(params=["gguf", "folder"])
def vocabulary(request, arrays, tmp_path):
    return {"gguf": from_gguf, "folder": from_folder}[request.param](tmp_path, arrays)


def from_gguf(tmp_path, arrays, changes=()):
    llamas.write_gguf(tmp_path / "a.gguf", arrays, changes)
    return demo.read_vocabulary(checkpoints.open_gguf(tmp_path / "a.gguf", names="huggingface"))


def from_folder(tmp_path, arrays):
    return demo.read_vocabulary(checkpoints.open_folder(llamas.write_folder(tmp_path, arrays)))


def words(vocabulary, text):
    return [llamas.TOKENS[i] for i in vocabulary.encode(text)]


def test_text_is_split_and_joined_again(vocabulary):
    assert words(vocabulary, "In the 12") == ["I", "n", "Ġthe", "Ġ", "1", "2"]
    assert "".join(vocabulary.pieces(vocabulary.encode(TEXT))) == TEXT
    assert vocabulary.encode("a<|im_end|>b")[1] == llamas.STOP


def test_pieces_end_at_a_stop_and_hold_whole_characters(vocabulary):
    ids = vocabulary.encode("aé日")
    assert len(ids) == 6  # One byte each.
    pieces = list(vocabulary.pieces([*ids, llamas.STOP, *ids]))
    assert len(pieces) == 6
    assert [p for p in pieces if p] == ["a", "é", "日"]


def test_conversations_follow_the_template(vocabulary):
    pytest.importorskip("jinja2", reason="pip install -e '.[test]'")
    ids = vocabulary.encode_chat("Hello")
    text = vocabulary.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nHello<|im_end|><|im_start|>assistant\n"
    assert (ids[0], llamas.STOP in ids) == (0, True)


def test_words_are_split_as_the_file_says(tmp_path, arrays):
    gpt2 = from_gguf(tmp_path, arrays, [("tokenizer.ggml.pre", STRING, "gpt-2")])
    assert words(gpt2, "1212") == ["12", "12"]
    changes = [
        ("tokenizer.ggml.pre", STRING, "llama-bpe"),
        ("tokenizer.ggml.add_bos_token", BOOL, 0),
    ]
    llama3 = from_gguf(tmp_path, arrays, changes)
    assert words(llama3, "1212") == ["12", "1", "2"]


def test_words_of_llama3_that_are_tokens_are_not_merged_from_parts(tmp_path, arrays):
    merges = [m for m in llamas.MERGES if m != "Ġt he"]
    changes = [("tokenizer.ggml.merges", ARRAY, (STRING, merges))]
    parts = from_gguf(tmp_path, arrays, changes)
    assert words(parts, " the") == ["Ġt", "he"]
    changes += [("tokenizer.ggml.pre", STRING, "llama-bpe")]
    whole = from_gguf(tmp_path, arrays, changes)
    # Llama 3's files do not say that texts start with a token.
    assert words(whole, " the") == [llamas.TOKENS[0], "Ġthe"]


def test_tokens_that_users_defined_are_found_in_text(tmp_path, arrays):
    types = [3, 3, *[4 if t == "in" else 1 for t in llamas.TOKENS[2:]]]
    assert words(from_gguf(tmp_path, arrays), "a12in") == ["a", "1", "2", "in"]
    assert words(from_gguf(tmp_path, arrays), "iin") == ["i", "in"]
    changes = [("tokenizer.ggml.token_type", ARRAY, (5, types))]
    changes += [("tokenizer.ggml.merges", ARRAY, (STRING, llamas.MERGES[:4]))]
    found = from_gguf(tmp_path, arrays, changes)
    assert words(found, "a in") == ["a", "Ġ", "in"]
    assert "".join(found.pieces(found.encode("a in"))) == "a in"


def test_texts_start_with_a_token_if_the_file_says_so(tmp_path, arrays):
    change = ("tokenizer.ggml.add_bos_token", BOOL, 1)
    assert words(from_gguf(tmp_path, arrays, [change]), "a") == ["<|im_start|>", "a"]


# Overlapping pieces of a few letters, each with its own score.
PIECES = [
    *"\u2581abc",
    "ab",
    "\u2581a",
    "bc",
    "aa",
    "aab",
    "\u2581\u2581",
    "cab",
    "ca",
    "abc",
    "baa",
]
PIECES += ["\u2581aa", "bcab", "ba", "cc", "aaa", "\u2581ca", "bab", "cabc"]
CONTROLS = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
SCORED = [*CONTROLS, *BYTES, *PIECES, "[x]"]
TYPES = [2, 3, 3, *[6] * 256, *[1] * len(PIECES), 4]
SCORES = [*[0.0] * 259, *(-float(i) for i in range(len(PIECES))), 0.0]


def sentencepiece(tmp_path, arrays, *changes):
    length = max(len(llamas.TOKENS), len(SCORED))
    padding = [f"<unused{i}>" for i in range(length - len(SCORED))]
    pairs = [
        ("tokenizer.ggml.model", STRING, "llama"),
        ("tokenizer.ggml.pre", STRING, "default"),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, [*SCORED, *padding])),
        ("tokenizer.ggml.token_type", ARRAY, (5, [*TYPES, *[5] * len(padding)])),
        ("tokenizer.ggml.scores", ARRAY, (gguf_files.FLOAT32, [*SCORES, *[0.0] * len(padding)])),
        ("tokenizer.ggml.bos_token_id", UINT32, 1),
        ("tokenizer.ggml.eos_token_id", UINT32, 2),
        ("tokenizer.ggml.unknown_token_id", UINT32, 0),
    ]
    return from_gguf(tmp_path, arrays, [*pairs, *changes])


def joined_by_score(text):
    """SentencePiece: of all neighbours that make up a piece, those with the highest score first."""
    symbols = list(text.replace(" ", "\u2581"))
    scores = dict(zip(SCORED, SCORES, strict=True))
    while True:
        pairs = ((a + b, i) for i, (a, b) in enumerate(itertools.pairwise(symbols)))
        known = [(-scores[piece], i, piece) for piece, i in pairs if piece in PIECES]
        if not known:
            break
        _, i, piece = min(known)
        symbols[i : i + 2] = [piece]
    bytes_of = ([f"<0x{b:02X}>" for b in s.encode()] for s in symbols)
    found = [[s] if s in PIECES else b for s, b in zip(symbols, bytes_of, strict=True)]
    return [SCORED.index(s) for s in itertools.chain(*found)]


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(text=st.text(" aabbccé日\n", max_size=20))
def test_sentencepiece_joins_characters_by_score(scored, text):
    ids = scored.encode(text)
    assert ids == [1, *joined_by_score(f" {text}" if text else "")]
    assert "".join(scored.pieces(ids)) == (f" {text}" if text else "")


@pytest.fixture(scope="module")
def scored(tmp_path_factory, arrays):
    return sentencepiece(tmp_path_factory.mktemp("scored"), arrays)


def test_sentencepiece_options_of_a_file(tmp_path, arrays, scored):
    # A space comes first after whole tokens, too, as in llama.cpp.
    whole = SCORED.index("[x]")
    assert scored.encode("b[x]c") == [1, *joined_by_score(" b"), whole, *joined_by_score(" c")]
    assert scored.encode("</s>") == [1, 2]
    changes = [(f"tokenizer.ggml.add_{name}", BOOL, 0) for name in ("bos_token", "space_prefix")]
    plain = sentencepiece(tmp_path, arrays, *changes)
    assert plain.encode("aab") == joined_by_score("aab")
    without = ("tokenizer.ggml.scores", ARRAY, (gguf_files.FLOAT32, [0.0]))
    with pytest.raises(ValueError, match="its tokenizer is malformed: ValueError"):
        sentencepiece(tmp_path, arrays, without)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("tokenizer.ggml.model", STRING, "llama"), "llama with .* got 'llama' with 'smollm'. Use"),
        (("tokenizer.ggml.model", STRING, "t5"), "supported: gpt2 with .* got 't5' with 'smollm'"),
        (("tokenizer.ggml.pre", STRING, "odd"), "smollm, gpt-2, .* got 'gpt2' with 'odd'. Use the"),
        (("tokenizer.ggml.tokens", ARRAY, (STRING, ["a"])), "its tokenizer is malformed: "),
        (("tokenizer.ggml.model", ARRAY, (UINT32, [1])), r"supported: .*; got \[1\] with 'smollm'"),
        (("tokenizer.ggml.eot_token_id", ARRAY, (UINT32, [1])), "tokenizer is malformed: TypeErr"),
        (("tokenizer.ggml.eos_token_id", UINT32, 10**6), "malformed: IndexError.* Copy the file"),
    ],
)
def test_other_tokenizers_are_errors(tmp_path, arrays, change, text):
    with pytest.raises(ValueError, match=text):
        from_gguf(tmp_path, arrays, [change])


def test_models_without_a_template_do_not_chat(tmp_path, arrays):
    folder = llamas.write_folder(tmp_path, arrays)
    (folder / "tokenizer_config.json").unlink()
    vocabulary = demo.read_vocabulary(checkpoints.open_folder(folder))
    with pytest.raises(ValueError, match="no template for conversations; got the message 'Hello'"):
        vocabulary.encode_chat("Hello")


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if %}", 3])
def test_templates_that_fail_are_an_error(tmp_path, arrays, template):
    pytest.importorskip("jinja2", reason="pip install -e '.[test]'")
    folder = llamas.write_folder(tmp_path, arrays)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    vocabulary = demo.read_vocabulary(checkpoints.open_folder(folder))
    with pytest.raises(ValueError, match=r"template for conversations failed: .*it starts with"):
        vocabulary.encode_chat("Hello")


@pytest.mark.parametrize(("stops", "want"), [(None, set()), (7, {7}), ([], set())])
def test_folders_may_have_no_stop(tmp_path, arrays, stops, want):
    folder = llamas.write_folder(tmp_path, arrays, eos_token_id=stops)
    assert demo.read_vocabulary(checkpoints.open_folder(folder)).stops == want


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "generation_config.json",
            "[1]",
            r"generation_config.json must hold an object; got '\[1\]'",
        ),
        ("generation_config.json", '{"eos_token_id": "x"}', r"a list of ids; got \['x'\]. Copy"),
    ],
)
def test_odd_files_of_a_folder_are_errors(tmp_path, arrays, name, text, message):
    folder = llamas.write_folder(tmp_path, arrays)
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        demo.read_vocabulary(checkpoints.open_folder(folder))


def test_the_files_of_a_folder_complement_each_other(tmp_path, arrays):
    folder = llamas.write_folder(tmp_path, arrays)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    vocabulary = demo.read_vocabulary(checkpoints.open_folder(folder))
    assert vocabulary.stops == {1, 7}
    assert vocabulary.template == "{{ messages[0]['content'] }}"
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json is not JSON: .* Copy it again"):
        demo.read_vocabulary(checkpoints.open_folder(folder))
