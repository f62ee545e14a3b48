"""Sampling: what each parameter leaves to chance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.errors import InvalidRequest
from rekindle.serve.request import Sampling
from rekindle.serve.sampling import Sampler, log_softmax

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], dtype=np.float32))


def drawn(sampling: Sampling, count: int = 400) -> set[int]:
    sampler = Sampler(sampling)
    return {sampler.choose(LOGITS) for _ in range(count)}


def test_temperature_zero_is_greedy() -> None:
    assert drawn(Sampling(temperature=0)) == {0}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(seed=1), {0, 1, 2, 3, 4}),
        (Sampling(seed=1, top_k=2), {0, 1}),
        (Sampling(seed=1, top_p=0.8), {0, 1, 2}),
        (Sampling(seed=1, top_p=0.75), {0, 1}),
        (Sampling(seed=1, top_p=0.0), {0}),
        (Sampling(seed=1, min_p=0.2), {0, 1, 2}),
        (Sampling(seed=1, top_k=3, top_p=0.6), {0, 1}),
        (Sampling(temperature=0, logit_bias={3: 50.0}), {3}),
        (Sampling(temperature=0, logit_bias={0: -100.0}), {1}),
        (Sampling(temperature=0, logit_bias={99: 100.0}), {0}),
    ],
)
def test_what_may_be_drawn(sampling: Sampling, expected: set[int]) -> None:
    assert drawn(sampling) == expected


def test_draws_follow_the_probabilities() -> None:
    sampler = Sampler(Sampling(seed=3))
    counts = np.bincount([sampler.choose(LOGITS) for _ in range(20_000)], minlength=5) / 20_000
    assert np.abs(counts - np.exp(LOGITS)).max() < 0.02


def test_penalties_lead_away_from_what_was_said() -> None:
    sampler = Sampler(Sampling(temperature=0, frequency_penalty=0.5))
    assert len({sampler.choose(LOGITS) for _ in range(6)}) > 1


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3.0])
def test_values_without_meaning_are_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=name) as refusal:
        Sampling(**{name: value})
    assert refusal.value.param == name


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=50))
def test_log_softmax_is_normalised(values: list[float]) -> None:
    logprobs = log_softmax(np.array(values, dtype=np.float32))
    assert abs(float(np.exp(logprobs.astype(np.float64)).sum()) - 1) < 1e-4
    assert (logprobs <= 1e-6).all()
