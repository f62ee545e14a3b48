"""Streams of text: no half characters, nothing of a stop string, nothing lost."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rekindle.serve.text import TextStream


@given(st.text(max_size=40), st.lists(st.integers(0, 200)), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_the_pieces_make_the_text_up_to_the_first_stop_string(text: str, cuts: list[int], stops: list[str]) -> None:
    data = text.encode()
    borders = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    stream = TextStream(tuple(stops))
    got = [stream.add(data[start:stop]) for start, stop in pairwise(borders)]
    for piece in got:
        piece.encode()
    whole = "".join(got) + stream.flush()
    if stream.stopped:
        assert text.startswith(whole)
        assert not any(stop in whole for stop in stops)
        assert any(text.startswith(stop, len(whole)) for stop in stops)
    else:
        assert whole == text
        assert not any(stop in text for stop in stops)


def test_a_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    stream = TextStream(("END",))
    assert [stream.add(b"so E"), stream.add(b"N"), stream.add(b"T"), stream.flush()] == ["so ", "", "ENT", ""]


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    stream = TextStream()
    assert stream.add("é".encode()[:1]) == ""
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
