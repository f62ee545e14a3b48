"""How work is cut into batches for llama.cpp."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.engine.batch import Span, split
from rekindle.tokens import SHORT_REST, as_tokens, first_part


def spans_of(*lengths: int) -> list[Span]:
    return [Span(seq, 10 * seq, as_tokens(range(length)), True) for seq, length in enumerate(lengths)]


def sizes(spans: list[Span], limit: int) -> list[int]:
    return [sum(len(span.tokens) for span in part) for part in split(spans, limit, 512)]


@pytest.mark.parametrize(
    ("length", "limit", "expected"),
    [
        (20, 2048, [20]),
        (512, 2048, [512]),
        (540, 2048, [320, 220]),
        (576, 2048, [576]),
        (1052, 2048, [512, 320, 220]),
        (1052, 512, [512, 320, 220]),
        (1600, 2048, [1600]),
        (4100, 2048, [2048, 1536, 320, 196]),
        (300, 256, [256, 44]),
    ],
)
def test_no_micro_batch_of_a_long_prompt_is_short(length: int, limit: int, expected: list[int]) -> None:
    assert sizes(spans_of(length), limit) == expected


@given(st.lists(st.integers(1, 700), min_size=1, max_size=6), st.sampled_from([512, 1024, 2048]))
def test_all_tokens_are_there_in_order_and_logits_are_asked_for_once(lengths: list[int], limit: int) -> None:
    parts = list(split(spans_of(*lengths), limit, 512))
    assert all(sum(len(span.tokens) for span in part) <= limit for part in parts)
    for seq, length in enumerate(lengths):
        mine = [span for part in parts for span in part if span.seq == seq]
        assert np.array_equal(np.concatenate([span.tokens for span in mine]), np.arange(length))
        assert [span.position for span in mine] == [10 * seq + int(span.tokens[0]) for span in mine]
        assert [span.logits for span in mine] == [False] * (len(mine) - 1) + [True]


@given(st.integers(1, 10_000), st.sampled_from([512, 2048]))
def test_long_prompts_leave_no_short_rest(length: int, limit: int) -> None:
    parts = sizes(spans_of(length), limit)
    micro = [min(512, size - start) for size in parts for start in range(0, size, 512)]
    assert length < SHORT_REST or min(micro) >= SHORT_REST


@pytest.mark.parametrize(("count", "most", "part"), [(10, 512, 10), (512, 512, 512), (540, 512, 320), (600, 512, 512)])
def test_the_first_part_leaves_no_short_rest(count: int, most: int, part: int) -> None:
    assert first_part(count, most) == part
