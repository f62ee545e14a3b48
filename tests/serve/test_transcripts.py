"""Texts that are remembered with their tokens."""

from __future__ import annotations

import numpy as np
import pytest

from rekindle.model.tokenizer import GgufTokenizer
from rekindle.serve.service import Service
from rekindle.serve.transcripts import Transcripts
from rekindle.settings import Settings
from rekindle.tokens import as_tokens

ME, YOU = (b"me", False, False), (b"you", False, False)


def test_the_latest_prompts_are_remembered_by_their_owner() -> None:
    kept = Transcripts(max_prompts=2)
    for number, text in enumerate(("one", "two")):
        kept.add_prompt(ME, text, as_tokens([number]))
    assert kept.prompt(YOU, "one") is None
    assert kept.prompt(ME, "on") is None
    assert np.array_equal(kept.prompt(ME, "one"), [0])  # used again, so the other one leaves
    kept.add_prompt(ME, "three", as_tokens([2]))
    assert [kept.prompt(ME, text) is not None for text in ("one", "two", "three")] == [True, False, True]
    kept.clear()
    assert kept.prompt(ME, "one") is None


def test_a_prompt_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    encode = GgufTokenizer.encode

    def counted(self: GgufTokenizer, text: str, *, bos: bool = False) -> object:
        texts.append(text)
        return encode(self, text, bos=bos)

    monkeypatch.setattr(GgufTokenizer, "encode", counted)
    with Service.open(Settings.load(threads=1, context=512, store="none")) as service:
        texts.clear()
        messages = [{"role": "user", "content": "How many hens does the miller keep?"}]
        first, again = (service.chat_prompt(messages) for _ in range(2))
        assert len(texts) == 1
        assert np.array_equal(first.tokens, again.tokens) and first.text == again.text
        assert np.array_equal(service.chat_prompt(messages, salt=b"other").tokens, first.tokens)
        assert len(texts) == 2, "whether somebody else has asked this is nobody's business"
        assert len(service.text_prompt("hens").tokens) and len(service.text_prompt("hens").tokens)
        assert len(texts) == 3
