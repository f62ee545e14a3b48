"""Text to tokens and back: any text comes back whole, and no text or id harms the process."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.model.conftest import Maker

from rekindle.errors import InvalidRequest
from rekindle.model import tokenizer as module
from rekindle.model.gguf import GgufModel
from rekindle.model.tokenizer import GgufTokenizer

EMOJI = "👩‍👩‍👧 🇩🇪 é e\u0301 ß 中文 ไทย עברית 🫠"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def through(tokenizer: GgufTokenizer, text: str) -> str:
    """There and back, special tokens as they are written."""
    return b"".join(
        tokenizer.piece(int(t)) or tokenizer.special_text(int(t)).encode() for t in tokenizer.encode(text)
    ).decode()


@given(TEXT)
@example(EMOJI)
@example("\0a\0\x01\x7f\u200b\ufeff\u2028")
@example("  leading, \t\r\n trailing  ")
@example("<|end|><|user|> a <|nothing|>")
@example("")
def test_any_text_comes_back_whole(tokenizer: GgufTokenizer, text: str) -> None:
    assert through(tokenizer, text) == text


def test_ids_are_int32_and_of_the_vocabulary(tokenizer: GgufTokenizer) -> None:
    tokens = tokenizer.encode(EMOJI)
    assert tokens.dtype == np.int32
    assert tokens.min() >= 0 and tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode(tokens) == EMOJI


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "ok \ud83d then"])
def test_lone_surrogates_are_refused_with_their_place(tokenizer: GgufTokenizer, text: str) -> None:
    at = next(index for index, character in enumerate(text) if "\ud800" <= character <= "\udfff")
    with pytest.raises(InvalidRequest, match=f"character {at} is a lone surrogate"):
        tokenizer.encode(text)


def test_special_tokens_in_text_are_one_token_and_no_bytes(tokenizer: GgufTokenizer) -> None:
    assert tokenizer.eos is not None
    end = tokenizer.special_text(tokenizer.eos)
    assert tokenizer.encode(end).tolist() == [tokenizer.eos]
    assert tokenizer.is_special(tokenizer.eos) and tokenizer.is_end(tokenizer.eos)
    assert tokenizer.piece(tokenizer.eos) == b""
    assert tokenizer.decode(tokenizer.encode(f"a{end}b")) == "ab"
    assert not tokenizer.is_end(int(tokenizer.encode("a")[0]))
    assert tokenizer.special_text(None) == ""


def test_bos_stands_in_front_once_when_asked_for(tokenizer: GgufTokenizer) -> None:
    plain, begun = tokenizer.encode("Anna"), tokenizer.encode("Anna", bos=True)
    assert tokenizer.adds_bos and tokenizer.bos not in plain.tolist()
    assert begun.tolist() == [tokenizer.bos, *plain.tolist()]
    assert tokenizer.encode("", bos=True).tolist() == [tokenizer.bos]
    assert tokenizer.encode("").tolist() == []


def test_a_model_that_wants_no_bos_gets_none_and_never_an_end(tmp_path: Path, tiny: Maker) -> None:
    """add_eos_token is for encoders: an end after the prompt would end every answer before it begins."""
    data = tiny("tiny-llama").read_bytes()
    for key, value in ((b"add_bos_token", b"\0"), (b"add_eos_token", b"\1")):
        at = data.index(key) + len(key) + 4
        data = data[:at] + value + data[at + 1 :]
    path = tmp_path / "plain.gguf"
    path.write_bytes(data)
    with closing(GgufModel(path, vocab_only=True)) as model:
        tokenizer = GgufTokenizer(model)
        assert not tokenizer.adds_bos
        assert tokenizer.encode("Anna", bos=True).tolist() == tokenizer.encode("Anna").tolist()
        assert tokenizer.eos not in tokenizer.encode("Anna", bos=True).tolist()


def test_pieces_may_be_halves_of_characters(tokenizer: GgufTokenizer) -> None:
    tokens = tokenizer.encode("🫠")
    pieces = [tokenizer.piece(int(token)) for token in tokens]
    assert len(pieces) > 1 and b"".join(pieces) == "🫠".encode()
    assert "\ufffd" in tokenizer.decode(tokens[:-1])
    assert tokenizer.decode([]) == ""


def test_every_piece_of_the_vocabulary_can_be_asked_for(tokenizer: GgufTokenizer) -> None:
    pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    assert set(b"".join(pieces)) == set(range(256))
    assert pieces == [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]


@pytest.mark.parametrize("token", [-1, -(2**31), 2**31 - 1, None])
def test_unknown_ids_are_refused(tokenizer: GgufTokenizer, token: int | None) -> None:
    token = tokenizer.vocab_size if token is None else token
    for ask in (
        tokenizer.piece,
        tokenizer.is_end,
        tokenizer.is_special,
        tokenizer.special_text,
        lambda t: tokenizer.decode([t]),
    ):
        with pytest.raises(InvalidRequest, match="token ids must be between 0 and"):
            ask(token)


def test_threads_may_use_one_tokenizer(tokenizer: GgufTokenizer) -> None:
    texts = [f"{EMOJI} {number} " * 20 for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: tokenizer.decode(tokenizer.encode(text)), texts)) == texts


# Long words.

_LONG_WORDS = {
    "letters": "a" * 60_000,
    "spaces": " " * 60_000,
    "lines": "\n" * 60_000,
    "slashes after a mark": "!" + "\n/" * 30_000,
    "mixed case": "aB" * 30_000,
    "marks": "e\u0301" * 30_000,
    "emoji": "😀" * 30_000,
    "digits": "1" * 60_000,
    "punctuation": "!?" * 30_000,
    "odd spaces": " \u3000" * 30_000,
    "separators": "!\x1c" * 30_000,
    "no spaces": "中文，" * 20_000,
}
_READ_ALL = """
import sys
from pathlib import Path
from rekindle.model.gguf import GgufModel
from rekindle.model.tokenizer import GgufTokenizer
tokenizer = GgufTokenizer(GgufModel(Path(sys.argv[1]), vocab_only=True))
words = eval(sys.stdin.read())
for name, word in words.items():
    print(name, flush=True)
    assert tokenizer.decode(tokenizer.encode(word)) == word
"""


@pytest.mark.parametrize("words", ["tekken", "deepseek-v3", "default"])
def test_endless_words_do_not_overflow_the_stack(tmp_path: Path, tiny: Maker, words: str) -> None:
    """Vocabularies whose words llama.cpp finds with std::regex, one call deep per character."""
    path = tmp_path / "words.gguf"
    with_words(path, tiny("tiny-llama"), words)
    run = subprocess.run(
        [sys.executable, "-c", _READ_ALL, str(path)],
        input=repr(_LONG_WORDS),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    assert run.returncode == 0, (
        f"{run.stdout.splitlines()[-1:]} ended the process ({run.returncode}): {run.stderr[-500:]}"
    )


def with_words(path: Path, source: Path, words: str) -> None:
    """A vocabulary with another way to split words."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in gguf.GGUFReader(source).fields.items():
        if name.startswith("tokenizer."):
            value = words if name == "tokenizer.ggml.pre" else field.contents()
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, field.types[0], sub_type=element)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs are cut after a few characters, so that cuts are everywhere."""
    monkeypatch.setattr(module, "_LONGEST_RUN", 7)
    return 7


@given(
    st.lists(st.sampled_from(["a", "é", " ", "\n", "<|end|>", "<|", "|>", "😀", "/", "word "]), max_size=60).map(
        "".join
    )
)
def test_cut_text_comes_back_whole_and_keeps_its_special_tokens(tokenizer: GgufTokenizer, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        specials = [token for token in tokenizer.encode(text).tolist() if tokenizer.is_special(token)]
        patch.setattr(module, "_LONGEST_RUN", 7)
        tokens = tokenizer.encode(text).tolist()
        assert [token for token in tokens if tokenizer.is_special(token)] == specials
        assert through(tokenizer, text) == text


def test_a_cut_does_not_depend_on_what_follows(tokenizer: GgufTokenizer, short_runs: int) -> None:
    """A prompt that grows keeps its tokens but for the last few."""
    text = "x" * 200
    whole = tokenizer.encode(text).tolist()
    for length in range(short_runs, 200, short_runs):
        known = tokenizer.encode(text[:length]).tolist()
        assert whole[: len(known)] == known


def test_text_without_long_words_is_never_cut(tokenizer: GgufTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Anna paints in orange.\n" * 50
    expected = tokenizer.encode(text).tolist()
    monkeypatch.setattr(module, "_LONGEST_RUN", 30)
    assert tokenizer.encode(text).tolist() == expected
