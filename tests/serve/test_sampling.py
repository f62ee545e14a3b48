"""Sampling: what each parameter leaves to chance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.errors import InvalidRequest
from rekindle.serve.request import Sampling
from rekindle.serve.sampling import Sampler, largest, log_softmax

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


def plain(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities as the definitions say, without regard to speed, [vocab_size]."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature)
    if 0 < sampling.top_k < len(weights):
        weights[np.argsort(-weights, kind="stable")[sampling.top_k :]] = 0
    ordered = np.sort(weights)[::-1]
    last = int(np.searchsorted(np.cumsum(ordered), sampling.top_p * ordered.sum()))
    least = max(sampling.min_p, ordered[min(last, len(ordered) - 1)] if sampling.top_p < 1 else 0.0)
    weights[weights < least] = 0
    return np.asarray(weights / weights.sum())


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 12.0])  # from all alike to nearly certain
@pytest.mark.parametrize(
    "wish",
    [{}, {"top_k": 7}, {"top_k": 900}, {"top_p": 0.3}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 50, "top_p": 0.8}],
)
def test_large_vocabularies_are_drawn_from_as_the_definitions_say(spread: float, wish: dict[str, float]) -> None:
    """Only what may be drawn is, and as often as it should be; the shortcuts for long rows are taken."""
    random = np.random.default_rng(7)
    logits = (random.standard_normal(3001) * spread + random.permutation(3001) * 1e-4).astype(np.float32)
    sampling = Sampling(temperature=0.9, seed=11, **wish)  # type: ignore[arg-type]
    expected = plain(logits, sampling)
    sampler = Sampler(sampling)
    draws = np.bincount([sampler.choose(logits) for _ in range(3000)], minlength=3001)
    best_first = np.argsort(-logits)
    allowed = set(best_first[: np.count_nonzero(expected) + 1].tolist())  # rounding may let one more in
    assert set(np.flatnonzero(draws).tolist()) <= allowed
    heavy = expected > 0.02
    assert np.abs(draws[heavy] / 3000 - expected[heavy]).max(initial=0.0) < 0.05


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=2000), st.integers(1, 40))
def test_largest_finds_the_greatest_values(values: list[float], count: int) -> None:
    array = np.array(values, dtype=np.float32)
    count = min(count, len(values))
    found = largest(array, count)
    assert len(set(found.tolist())) == count
    assert sorted(array[found].tolist()) == sorted(values)[-count:]


def test_a_temperature_of_almost_nothing_is_greedy() -> None:
    assert drawn(Sampling(temperature=1e-300)) == drawn(Sampling(temperature=1e-6)) == {0}
