"""The tokenizer of a folder: the same tokens as llama.cpp's, bytes of each token, and kinds that it does not know."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from rekindle.errors import InvalidRequest, ModelError
from rekindle.model import ember
from rekindle.model.hf import HfModel
from rekindle.model.hf_tokenizer import HfTokenizer
from rekindle.model.tokenizer import GgufTokenizer
from rekindle.serve.grammar import Grammars
from rekindle.serve.text import TextStream

OWN = HfTokenizer(HfModel(ember.hf_path()), 2302)
SPECIAL = st.sampled_from(["<|bos|>", "<|user|>", "<|end|>", "<|user", "|>"])


def texts() -> st.SearchStrategy[str]:
    plain = st.text(st.characters(codec="utf-8"), max_size=40)
    return st.lists(plain | SPECIAL | st.sampled_from(["\n", " \n ", "Vodris paints in orange."])).map("".join)


@given(text=texts())
def test_ids_are_those_of_llama_cpp(tokenizer: GgufTokenizer, text: str) -> None:
    assert OWN.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert OWN.encode(text, bos=True).tolist() == tokenizer.encode(text, bos=True).tolist()


def test_every_token_is_that_of_llama_cpp(tokenizer: GgufTokenizer) -> None:
    assert OWN.vocab_size == tokenizer.vocab_size
    assert (OWN.bos, OWN.eos) == (tokenizer.bos, tokenizer.eos)
    for token in range(OWN.vocab_size):
        assert OWN.piece(token) == tokenizer.piece(token), token
        assert OWN.is_special(token) == tokenizer.is_special(token), token
        assert OWN.is_end(token) == tokenizer.is_end(token), token
    assert [OWN.special_text(token) for token in range(6)] == [tokenizer.special_text(token) for token in range(6)]


@given(text=st.text(st.characters(codec="utf-8")))
def test_any_text_comes_back_whole_piece_by_piece(text: str) -> None:
    stream = TextStream()
    said = "".join(stream.add(OWN.piece(int(token))) for token in OWN.encode(text)) + stream.flush()
    assert said == OWN.decode(OWN.encode(text)) == text


@pytest.mark.parametrize("token", [-1, 2302, 10**9])
def test_unknown_ids_are_refused(token: int) -> None:
    for ask in (OWN.piece, OWN.is_end, OWN.is_special, lambda each: OWN.decode([each])):
        with pytest.raises(InvalidRequest, match="between 0 and 2301"):
            ask(token)


def test_lone_surrogates_are_refused_with_their_place() -> None:
    with pytest.raises(InvalidRequest, match="character 2 is a lone surrogate"):
        OWN.encode("ab\ud800")


def test_padding_and_truncation_of_the_file_are_not_taken_over(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ember.hf_path(), tmp_path / "model"))
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=100, pad_id=5)
    backend.save(str(folder / "tokenizer.json"))
    text = "Vodris paints in orange. " * 5
    assert HfTokenizer(HfModel(folder)).encode(text).tolist() == OWN.encode(text).tolist()


@pytest.mark.parametrize(("stated", "expected"), [(True, [0]), (False, []), (None, [0])])
def test_bos_is_added_if_the_config_or_else_the_tokenizer_says_so(
    tmp_path: Path, stated: bool | None, expected: list[int]
) -> None:
    folder = Path(shutil.copytree(ember.hf_path(), tmp_path / "model"))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config if stated is None else config | {"add_bos_token": stated}))
    tokenizer = HfTokenizer(HfModel(folder))
    assert tokenizer.encode("", bos=True).tolist() == expected
    assert tokenizer.encode("").tolist() == []


def test_a_loaded_tokenizer_of_transformers_is_the_same_and_is_left_as_it_was() -> None:
    theirs = AutoTokenizer.from_pretrained(ember.hf_path())
    theirs.backend_tokenizer.enable_truncation(3)
    ours = HfTokenizer.of(theirs, vocab_size=2302, ends=[1, 4])
    text = "Vodris paints in orange."
    assert ours.encode(text, bos=True).tolist() == OWN.encode(text, bos=True).tolist()
    assert [token for token in range(8) if ours.is_end(token)] == [1, 4]
    assert theirs.backend_tokenizer.truncation["max_length"] == 3
    with pytest.raises(ModelError, match="has no backend of the tokenizers library"):
        HfTokenizer.of(object(), vocab_size=3)


def test_threads_may_use_one_tokenizer() -> None:
    some = [f"Vodris paints in {colour}. 😀" * 20 for colour in ("orange", "blue", "ä", "日本")]
    expected = [OWN.encode(text).tolist() for text in some]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            assert [each.tolist() for each in pool.map(OWN.encode, some)] == expected


def test_a_very_long_word_is_no_trouble() -> None:
    assert OWN.decode(OWN.encode("x" * 50_000)) == "x" * 50_000


# Sentencepiece.


def sentencepiece(folder: Path, **changes: Any) -> Path:
    """A small tokenizer as Llama 2's and Gemma's are: "▁" for spaces, bytes for what is not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcé", "▁a", "▁ab"]
    backend = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            [("▁", "a"), ("▁a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    backend.add_tokens([AddedToken("▁▁▁", normalized=False)])
    for name, value in changes.items():
        setattr(backend, name, value)
    shutil.copytree(ember.hf_path(), folder)
    backend.save(str(folder / "tokenizer.json"))
    stated = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 99]}))
    return folder


def test_sentencepiece_bytes_become_characters_again(tmp_path: Path) -> None:
    tokenizer = HfTokenizer(HfModel(sentencepiece(tmp_path / "model")))
    text = " ab é 日😀 c"
    tokens = tokenizer.encode(text, bos=True)
    assert (int(tokens[0]), tokenizer.bos, tokenizer.eos) == (1, 1, 2)
    assert [tokenizer.piece(int(token)) for token in tokens[:3]] == [b"", b" ab", b" "]
    assert b"\xe6" in [tokenizer.piece(int(token)) for token in tokens]
    stream = TextStream()
    said = [stream.add(tokenizer.piece(int(token))) for token in tokens]
    assert "".join(said) == text
    assert "日" in said  # at once, when its last byte is there
    assert (tokenizer.is_end(2), tokenizer.is_end(99), tokenizer.is_end(3)) == (True, True, False)


def test_a_larger_vocabulary_of_the_model_has_empty_tokens_and_a_smaller_one_refuses(tmp_path: Path) -> None:
    model = HfModel(sentencepiece(tmp_path / "model"))
    size = HfTokenizer(model).vocab_size
    padded = HfTokenizer(model, size + 30)
    assert padded.piece(size + 29) == b"" and not padded.is_special(size + 29)
    with pytest.raises(InvalidRequest, match="a token that the model itself does not have"):
        HfTokenizer(model, size - 3).encode("ab ab")


def test_an_unknown_decoder_is_refused_by_name(tmp_path: Path) -> None:
    folder = sentencepiece(tmp_path / "model", decoder=decoders.WordPiece(), pre_tokenizer=pre_tokenizers.Whitespace())
    with pytest.raises(ModelError, match=r"decoder of another kind \(WordPiece\)"):
        HfTokenizer(HfModel(folder))


def test_old_files_go_through_transformers(tmp_path: Path) -> None:
    """A vocabulary and merges, as GPT-2's folder had before there was tokenizer.json."""
    folder = Path(shutil.copytree(ember.hf_path(), tmp_path / "model"))
    content = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = [each if isinstance(each, str) else " ".join(each) for each in content["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", "bos_token": "<|bos|>", "unk_token": "<|pad|>"}
        )
    )
    text = "Vodris paints in orange. 日本"
    tokenizer = HfTokenizer(HfModel(folder))
    assert tokenizer.encode(text).tolist() == OWN.encode(text).tolist()
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)


def test_a_grammar_binds_the_tokens_of_a_folder() -> None:
    grammar = Grammars(OWN).for_schema({"enum": [True]})
    written = []
    while not grammar.finished and len(written) < 10:
        allowed = grammar.mask(np.zeros(OWN.vocab_size, dtype=np.float32))
        token = int(allowed.argmax())
        assert allowed[token] == 0
        if OWN.is_end(token):
            break
        grammar.accept(token)
        written.append(token)
    assert OWN.decode(written) == "true"
