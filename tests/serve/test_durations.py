"""Spans of time: what people write, and what is refused."""

from __future__ import annotations

import pytest

from rekindle.errors import InvalidRequest
from rekindle.serve.durations import in_words, seconds_of


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("30s", 30),
        ("10m", 600),
        ("2h", 7200),
        ("1d", 86400),
        ("1w", 604800),
        ("1.5h", 5400),
        ("90", 90),
        (" 5 M ", 300),
    ],
)
def test_what_people_write(written: str, seconds: float) -> None:
    assert seconds_of(written) == seconds


@pytest.mark.parametrize("number", [1, 0.5, 3600])
def test_numbers_are_seconds(number: float) -> None:
    assert seconds_of(number) == number


@pytest.mark.parametrize(
    "bad",
    ["", "m", "10x", "-5m", "1h30m", "0", "0s", "1e9", "ten", 0, -1, float("nan"), float("inf"), "9" * 13],
)
def test_what_is_no_time_is_refused(bad: str | float) -> None:
    with pytest.raises(
        InvalidRequest, match="expected a time such as 30s, 10m, 2h, 1d, or a number of seconds"
    ) as told:
        seconds_of(bad, param="pin")
    assert told.value.param == "pin"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (61, "1 min 1 s"),
        (599, "9 min"),
        (7199, "1 h 59 min"),
        (90061, "1 d 1 h"),
        (8.9 * 86400, "8 d"),
    ],
)
def test_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
