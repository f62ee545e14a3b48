"""The event stream codec: any JSON value, cut anywhere, comes back whole."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.api import sse

TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\r\n\x0b\x1c\x85\u2028\u2029:"))


@given(st.lists(TEXTS), st.lists(st.integers(0, 200)))
def test_what_is_encoded_is_decoded_however_it_is_cut(texts: list[str], cuts: list[int]) -> None:
    data = b"".join(sse.encode({"text": text}) for text in texts) + sse.DONE
    decoder, found = sse.Decoder(), []
    for cut in cuts:
        found += decoder.decode(data[:cut])
        data = data[cut:]
    found += decoder.decode(data)
    assert [json.loads(event)["text"] for event in found[:-1]] == texts
    assert found[-1] == "[DONE]" and not decoder.flush()


@given(TEXTS)
def test_an_event_is_one_line_by_every_rule(text: str) -> None:
    event = sse.encode({"text": text})
    assert event.endswith(b"\n\n")
    assert len(event[:-2].splitlines()) == len(event[:-2].decode().splitlines()) == 1


def test_readable_text_stays_readable() -> None:
    assert sse.encode({"text": "Zürich 東京 🎉"}) == 'data: {"text":"Zürich 東京 🎉"}\n\n'.encode()


def test_a_lone_surrogate_does_not_break_a_stream() -> None:
    assert sse.encode({"text": "a\ud800b"}) == b'data: {"text":"a?b"}\n\n'


def test_numbers_that_json_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        sse.encode(float("nan"))


def test_the_decoder_follows_the_format() -> None:
    decoder = sse.Decoder()
    assert decoder.decode(b": comment\r\nid: 7\r\ndata: a\r\ndata:b\r\n\r\n\r\ndata") == ["a\nb"]
    assert decoder.flush(), "an event was broken off"
    assert not decoder.flush()
